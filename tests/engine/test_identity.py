"""Acceptance 2 (and museum rows 5, 6, 8, 17): with every key kept, outputs are stock vLLM's."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest

from tests.engine import driver

pytestmark = [pytest.mark.engine, pytest.mark.slow]

#: Every key kept, bias 0; low threshold and little protection, so that most requests compact.
#: Room for the queries of everybody, so that everybody is compacted.
IDENTITY = {"ratio": 1.0, "threshold": 128, "recent_tokens": 16, "query_pool_share": 1.0}
#: Small chunks: prompts are prefilled over several steps, mixed with decodes.
CHUNKED = {"max_num_batched_tokens": 192, "max_num_seqs": 16}


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "options",
    [{}, CHUNKED, {**CHUNKED, "num_gpu_blocks_override": 65}],
    ids=["whole-prompts", "chunked-prefill", "tight-pool"],
)
def test_museum_6_8_17_runner_v1(tiny_model, mixed, options, force_async):
    asks, expected = mixed
    with driver.start(tiny_model, IDENTITY, force_async=force_async, **options) as engine:
        outputs = engine.run(asks)
        assert type(engine.scheduler).__name__ == (
            "CompactionAsyncScheduler" if force_async else "CompactionScheduler"
        )
        assert engine.totals.compactions >= 32
        assert not engine.totals.failures
        assert engine.used_blocks == 0
        assert any(engine.cached_tokens.values()), "prefix caching is on and hits"
        assert engine.totals.cache_hits + engine.totals.cache_adoptions > 0
    assert outputs == expected


def _case(model, asks, **more):
    return {"model": str(model), "asks": [asdict(a) for a in asks], **more}


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_museum_6_8_17_runner_v2(tiny_model, mixed, force_async):
    asks, expected = mixed
    result = driver.run_case(
        _case(
            tiny_model,
            asks[:64],
            kv_compaction=IDENTITY,
            v2=True,
            force_async=force_async,
            options={"max_num_batched_tokens": 512, "max_num_seqs": 32},
        )
    )
    assert "gpu" in result["runner"] or "cpu.model_runner" in result["runner"]
    assert result["compactions"] >= 24 and not result["failures"]
    assert result["shared"] > 0
    assert result["outputs"] == {k: v for k, v in expected.items() if int(k) < 64}


@pytest.mark.parametrize(
    "options",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "enforce_eager": False}],
    ids=["tp2", "pp2"],
)
def test_parallel(tiny_model, mixed, options):
    asks, expected = mixed
    result = driver.run_case(
        _case(
            tiny_model,
            asks[:64],
            kv_compaction=IDENTITY,
            options={**CHUNKED, **options},
            # Two ranks on one machine: each its own core, else OpenMP threads fight.
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
    )
    assert result["compactions"] >= 24 and not result["failures"]
    assert result["shared"] > 0
    assert result["outputs"] == {k: v for k, v in expected.items() if int(k) < 64}


def test_torch_compile(tiny_model, mixed):
    asks, expected = mixed
    result = driver.run_case(
        _case(tiny_model, asks[:24], kv_compaction=IDENTITY, options={"enforce_eager": False})
    )
    assert result["compactions"] >= 8 and not result["failures"]
    assert result["outputs"] == {k: v for k, v in expected.items() if int(k) < 24}


def test_ngram_speculation(tiny_model):
    # In a process of its own: numba, which it imports, trips vLLM's scan for kernels when another
    # engine is started later in the same process.
    asks = [driver.Ask(driver.random_prompt(random.Random(i), 40) * 6, 40) for i in range(6)]
    with driver.start(tiny_model) as engine:
        expected = engine.run(asks)
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    result = driver.run_case(
        _case(
            tiny_model,
            asks,
            kv_compaction=IDENTITY,
            options={"speculative_config": speculative},
        )
    )
    assert result["compactions"] >= 6 and not result["failures"]
    assert result["outputs"] == expected
