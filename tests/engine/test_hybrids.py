"""Models of which some layers have a sliding window: the others are compacted, these go on."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest
import torch

from tests.engine import driver
from tests.engine.models import make_hybrid_model
from tests.engine.quarter import check_a_quarter

pytestmark = [pytest.mark.engine, pytest.mark.slow]

IDENTITY = {"ratio": 1.0, "threshold": 128, "recent_tokens": 16}
CHUNKED = {"max_num_batched_tokens": 192, "max_num_seqs": 16, "num_gpu_blocks_override": 301}
WINDOW = 96


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, plugin):
    return make_hybrid_model(tmp_path_factory.mktemp("gemma"), "Gemma3Text", window=WINDOW)


@pytest.fixture(scope="module")
def asks():
    return driver.mixed_asks(32, seed=3)


@pytest.fixture(scope="module")
def expected(gemma, asks):
    with driver.start(gemma) as engine:
        return engine.run(asks)


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_identity_in_a_tight_pool(gemma, asks, expected, force_async):
    tight = {**CHUNKED, "num_gpu_blocks_override": 101}
    with driver.start(gemma, IDENTITY, force_async=force_async, **tight) as engine:
        assert len(engine.scheduler.compaction.blocks.windows) == 2
        assert len(engine.worker._compaction.layers) == 2
        assert engine.run(asks) == expected
        assert engine.totals.compactions >= 16 and not engine.totals.failures
        assert engine.used_blocks == 0
        assert any(engine.cached_tokens.values()), "prefix caching is on and hits"


@pytest.mark.parametrize(
    "case",
    [
        {"v2": True},
        {"options": {"tensor_parallel_size": 2}},
        {"options": {"pipeline_parallel_size": 2, "enforce_eager": False}},
    ],
    ids=["v2", "tp2", "pp2"],
)
def test_identity_in_other_setups(gemma, asks, expected, case):
    result = driver.run_case(
        {
            "model": str(gemma),
            "asks": [asdict(ask) for ask in asks],
            "kv_compaction": IDENTITY,
            "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "options" in case else {},
            **case,
            "options": {**CHUNKED, **case.get("options", {})},
        }
    )
    assert result["compactions"] >= 16 and not result["failures"]
    assert result["used_blocks"] == 0
    assert result["outputs"] == expected


def test_a_quarter_frees_the_blocks_of_the_formula(gemma):
    """Of the layers that are compacted; the others hold their window whatever happens."""
    assert max(check_a_quarter(gemma, 32)) <= -(-WINDOW // 32) + 1


def test_a_pool_that_holds_one_sequence_serves_many(gemma):
    """Sequences are compacted as they go, preempted, and end; nobody waits for ever."""
    rng = random.Random(1)
    asks = [driver.Ask(driver.random_prompt(rng, 900 + 100 * i), 30, arrives=i) for i in range(6)]
    options = {**CHUNKED, "num_gpu_blocks_override": 81}
    for threshold in (256, "30%"):
        compaction = {"ratio": 0.1, "threshold": threshold, "recent_tokens": 32}
        with driver.start(gemma, compaction, **options) as engine:
            outputs = engine.run(asks)
            assert all(len(output) == 30 for output in outputs.values())
            assert engine.totals.compactions >= 1 and engine.used_blocks == 0


def test_what_was_computed_over_a_segment_is_nobody_elses_prefix(gemma):
    """In no group of layers: a request that asks for exact KV gets what stock vLLM gives."""
    prompt = driver.random_prompt(random.Random(5), 600)
    off = {"kv_compaction": "off"}
    compaction = {"ratio": 0.1, "threshold": 128, "recent_tokens": 16}
    with driver.start(gemma, compaction) as engine:
        text = engine.run([driver.Ask(prompt, 200)])["0"]
        assert engine.totals.compactions >= 1
        longer = driver.Ask((*prompt, *text, 7), 24, off)
        # The first computes what is missing, and the second finds it.
        exact = [engine.run([longer], names=name)[f"{name}0"] for name in ("a", "b")]
        assert engine.cached_tokens["b0"] > len(prompt)
    with driver.start(gemma) as engine:
        assert exact == [engine.run([longer])["0"]] * 2


def test_a_hit_that_is_cut_short_still_has_its_windows(gemma, monkeypatch):
    """vLLM's own cut slices, and a window's layers would begin on null blocks."""
    from vllm_am.engine.scheduler.planner import Planner

    prompt = driver.random_prompt(random.Random(6), 700)
    asks = [driver.Ask(prompt, 8), driver.Ask((*prompt, 9, 11), 16, arrives=20)]
    # By default vLLM keeps the window of a prompt's end only, and nothing is left of a shorter hit.
    dense = {"prefix_cache_retention_interval": 32}
    with driver.start(gemma, **dense) as engine:
        stock = engine.run(asks)
    monkeypatch.setattr(Planner, "longest_hit", lambda *_: 320)
    with driver.start(gemma, IDENTITY, **dense) as engine:
        assert engine.run(asks) == stock
        assert engine.cached_tokens["1"] == 320


def test_the_planner_knows_what_the_windows_hold(gemma):
    """What one sequence can have is what they leave of the pool."""
    options = {**CHUNKED, "num_gpu_blocks_override": 81}
    prompt = driver.random_prompt(random.Random(7), 1900)
    compaction = {"ratio": 0.1, "threshold": 256, "recent_tokens": 32}
    with driver.start(gemma, compaction, **options) as engine:
        assert len(engine.run([driver.Ask(prompt, 60)])["0"]) == 60
        planner = engine.scheduler.compaction.planner
        assert planner.num_blocks == 80 and planner.other_groups == 2
        # The window, what a step adds, and a block where neither begins with one.
        assert planner.other_blocks == 2 * (-(-(WINDOW - 1 + 192) // 32) + 1)
        assert planner.blocks_for_one == 80 - planner.other_blocks


def test_a_window_that_no_sequence_reaches_is_none(tmp_path_factory, tiny_model, asks):
    """Mistral 7B v0.1: all layers have one of 4,096 tokens."""
    options = {"hf_overrides": {"use_sliding_window": True, "sliding_window": 4096}}
    options["hf_overrides"]["layer_types"] = ["sliding_attention"] * 3
    with driver.start(tiny_model) as engine:
        stock = engine.run(asks[:12])
    with driver.start(tiny_model, IDENTITY, **options) as engine:
        assert len(engine.worker._compaction.layers) == 3
        assert engine.run(asks[:12]) == stock
        assert engine.totals.compactions >= 4


@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 141}], ids=["roomy", "tight"])
def test_passes_start_on_windows_that_have_moved_on(gemma, options):
    """Nobody's answer changes, and every block finds its way back."""
    asks = [replace(ask, max_tokens=60) for ask in driver.mixed_asks(14, seed=9)]
    with driver.start(gemma) as engine:
        expected = engine.run(asks)
    compaction = {**IDENTITY, "queries": {"repeat-prefill": 1, "context-rotated": 1}}
    with driver.start(gemma, compaction, **{**CHUNKED, **options}) as engine:
        assert engine.run(asks) == expected
        totals = engine.totals
        assert totals.compactions >= 8 and not totals.failures and totals.reference_tokens > 0
        assert totals.reference_shortfalls < totals.compactions
        assert engine.used_blocks == 0


def test_a_pass_looks_for_what_a_continuation_would(gemma):
    """In a layer whose queries depend on those with a window: as if the text had gone on."""
    prompt = driver.random_prompt(random.Random(8), 500)
    compaction = {"ratio": 0.25, "threshold": 256, "recent_tokens": 32, "queries": "repeat-prefill"}
    with driver.start(gemma, compaction, enable_prefix_caching=False) as engine:
        layer, seen, texts = list(engine.worker._compaction.layers.values())[1], [], []
        forward = layer.impl.forward

        def look(module, query, *args, **kwargs):
            seen.append(query.clone())
            return forward(module, query, *args, **kwargs)

        starts = engine.scheduler._start_pass

        def start(study, plan):
            pass_id = starts(study, plan)
            texts.append((tuple(engine.scheduler.requests[pass_id].all_token_ids), study.end))
            return pass_id

        layer.impl.forward, engine.scheduler._start_pass = look, start
        engine.run([driver.Ask(prompt, 12)])
        assert engine.totals.compactions == 1 and not engine.totals.reference_shortfalls
        of_passes = list(seen)
        for text, end in texts:
            seen.clear()
            engine.run([driver.Ask(text, 1, {"kv_compaction": "off"})], names="alone")
            wanted = seen[0][end : len(text)]
            assert len(wanted) > 100
            places = [
                query[first : first + len(wanted)]
                for query in of_passes
                for first in range(len(query) - len(wanted) + 1)
            ]
            assert any(torch.allclose(place, wanted, atol=1e-3, rtol=1e-3) for place in places)
        assert texts and engine.used_blocks == 0
