"""The GPU's attention backend without a GPU: its metadata, its forward pass, whole engines.

Everything runs in processes of its own: with Triton's interpreter, or with vLLM made to believe
that this machine has an H200. What a GPU has to prove is in ``tests/gpu``.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict

import pytest

from benchmarks.fresh_process import environment
from tests.engine import driver

pytestmark = [pytest.mark.engine, pytest.mark.slow]

IDENTITY = {"ratio": 1.0, "threshold": 128, "recent_tokens": 16}
CHECKS = "tests/engine/cuda_path_checks.py"
CHUNKED = {"max_num_batched_tokens": 192, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def checks() -> str:
    """What pytest says about ``cuda_path_checks``, test by test."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", CHECKS],
        capture_output=True,
        text=True,
        cwd=driver.ROOT,
        env=environment(TRITON_INTERPRET="1"),
    )
    return process.stdout


def outcomes(checks: str, name: str = "") -> list[str]:
    """PASSED or FAILED of each check whose name contains ``name``."""
    lines = [
        line.split() for line in checks.splitlines() if f"::test_{name}" in line and "[" in line
    ]
    return [words[1] for words in lines if words[0].startswith("tests/")]


def test_metadata_and_forward_pass(checks):
    assert len(outcomes(checks)) > 80 and set(outcomes(checks)) == {"PASSED"}, checks[-6000:]


def test_museum_14_no_host_sync_in_a_step(checks):
    assert outcomes(checks, "no_host_sync") == ["PASSED"] * 4, checks[-6000:]


def case(model, asks, **more):
    return {"model": str(model), "asks": [asdict(a) for a in asks], "cuda_backend": True, **more}


def check(result, expected, compactions):
    assert result["backends"] == ["CompactionCUDABackend"]
    assert result["compactions"] >= compactions and not result["failures"]
    assert result["used_blocks"] == 0
    assert result["outputs"] == {k: v for k, v in expected.items() if k in result["outputs"]}


@pytest.mark.parametrize(
    "more",
    [{}, {"v2": True, "force_async": True, "options": {**CHUNKED, "num_gpu_blocks_override": 65}}],
    ids=["runner-v1", "runner-v2-async-preemption"],
)
def test_identity(tiny_model, mixed, more):
    asks, expected = mixed
    result = driver.run_case(
        case(tiny_model, asks[:24], kv_compaction=IDENTITY, **{"options": CHUNKED, **more})
    )
    check(result, expected, compactions=8)


def test_a_quarter_is_what_the_cpu_backend_makes_of_it(tiny_model):
    asks = [
        driver.Ask(driver.random_prompt(random.Random(i), 300 + 40 * i), 24, arrives=2 * i)
        for i in range(4)
    ]
    # Global budgets: the heads have page lists of different lengths, some none.
    compaction = {"ratio": 0.25, "threshold": 128, "recent_tokens": 16, "budgets": "global"}
    on_cpu, on_gpu = (
        driver.run_case(
            {**case(tiny_model, asks, kv_compaction=compaction), "cuda_backend": cuda_backend}
        )
        for cuda_backend in (False, True)
    )
    assert on_cpu["backends"] == ["CompactionCPUBackend"]
    assert on_gpu["blocks_freed"] == on_cpu["blocks_freed"] > 0
    check(on_gpu, on_cpu["outputs"], compactions=4)


def test_ngram_speculation(tiny_model):
    asks = [driver.Ask(driver.random_prompt(random.Random(i), 40) * 6, 30) for i in range(3)]
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    with driver.start(tiny_model) as engine:
        expected = engine.run(asks)
    result = driver.run_case(
        case(
            tiny_model,
            asks,
            kv_compaction=IDENTITY,
            options={"speculative_config": speculative},
        )
    )
    check(result, expected, compactions=3)


def test_an_h200_gets_the_gpu_classes(tiny_model):
    process = subprocess.run(
        [sys.executable, "-m", "tests.engine.pretended_h200", str(tiny_model)],
        capture_output=True,
        text=True,
        cwd=driver.ROOT,
        env=environment(),
    )
    assert process.returncode == 0, process.stderr[-6000:]
    found = json.loads(process.stdout.splitlines()[-1])
    refusals = found.pop("refusals")
    assert found == {
        "worker": ["CompactionCUDAWorker", "CompactionWorkerMixin", "Worker"],
        "scheduler": "CompactionAsyncScheduler",
        "backend": "CompactionCUDABackend",
        "layouts": ["LBHNC", "BLHNC"],
        "flash_attention": 3,
        "graphs": "FULL_AND_PIECEWISE",
        "graph_support": "UNIFORM_BATCH",
        "v2": True,
    }
    for flag, message in refusals.items():
        assert "--kv-compaction" in message and flag in message
