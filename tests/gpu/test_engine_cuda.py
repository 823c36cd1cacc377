"""End to end on a GPU: compaction against stock vLLM, with CUDA graphs, on both model runners.

Half precision rounds differently when attention is done in two parts, so now and then the greedy
choice between two nearly equal tokens differs. Hence parity is a bound on log-probabilities: they
differ little as long as the texts are equal, and where the texts part, the other token was nearly
as likely. A part of the context that is missing or wrong shifts them by far more: the model's
answers depend on all of it.

In a dry run (``benchmarks/gpu_suite``, ``--smoke``) the same tests serve a few requests on the CPU
build, with the GPU's backend through Triton's interpreter: it shows that they would run.
"""

from __future__ import annotations

import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_suite.stages import DRY
from tests.engine import driver
from tests.engine.models import make_random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() and DRY not in os.environ, reason="needs a CUDA device"
    ),
]

ON_GPU = torch.cuda.is_available()
#: Requests of the shared setups; each is worth at least a third of a compaction.
REQUESTS = 48 if ON_GPU else 6
IDENTITY = {"ratio": 1.0, "threshold": 128, "recent_tokens": 16}
#: Small chunks: prompts are prefilled over several steps, mixed with decodes.
OPTIONS = {
    "max_num_batched_tokens": 256,
    "max_num_seqs": 24,
    "enforce_eager": False,
    "gpu_memory_utilization": 0.3,
    "max_logprobs": 8,
}
#: Bound on the difference of log-probabilities, in nats.
TOLERANCE = {"float16": 0.05, "bfloat16": 0.35, "float32": 1e-3}


@dataclass
class Setup:
    """A model in one dtype, requests, and what stock vLLM makes of them."""

    model: Path
    dtype: str
    asks: list[driver.Ask]
    stock: dict[str, Any]

    def run(self, runner: str = "v2", **case: Any) -> dict[str, Any]:
        """Serve the requests with these options; see ``driver.main``."""
        return serve(self.model, self.dtype, self.asks, runner, **case)

    def check_parity(self, result: dict[str, Any], tolerance: float | None = None) -> None:
        """The result's texts and log-probabilities are those of stock vLLM."""
        bound = tolerance or TOLERANCE[self.dtype]
        assert result["outputs"].keys() == self.stock["outputs"].keys()
        for name, expected in self.stock["outputs"].items():
            positions = zip(
                result["outputs"][name],
                expected,
                result["likely"][name],
                self.stock["likely"][name],
                strict=True,
            )
            for position, (ours, theirs, our_odds, their_odds) in enumerate(positions):
                where = f"request {name}, token {position}"
                other = their_odds.get(str(ours), -torch.inf)
                assert their_odds[str(theirs)] - other <= bound, f"{where}: unlikely token"
                if ours != theirs:
                    break  # from here on the contexts differ
                difference = abs(our_odds[str(ours)] - their_odds[str(ours)])
                assert difference <= bound, f"{where}: log-probability differs by {difference}"


def serve(
    model: Path, dtype: str, asks: list[driver.Ask], runner: str = "v2", **case: Any
) -> dict[str, Any]:
    """Run one engine in a process of its own."""
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0"}
    options = {**OPTIONS, "dtype": dtype, **case.pop("options", {})}
    if not ON_GPU:
        options |= {"dtype": "float32", "enforce_eager": True}
        case |= {"v2": runner == "v2", "cuda_backend": True, "force_async": True}
    return driver.run_case(
        {
            "model": str(model),
            "asks": [asdict(ask) for ask in asks],
            "logprobs": 5,
            "options": options,
            "environment": environment,
            **case,
        }
    )


def make_setup(model: Path, dtype: str) -> Setup:
    asks = driver.mixed_asks(REQUESTS, seed=7)
    stock = serve(model, dtype, asks, options={"attention_backend": "FLASH_ATTN"} if ON_GPU else {})
    if ON_GPU:
        assert stock["backends"] == ["FlashAttentionBackend"] and stock["graphs"] > 0
    assert len({tuple(output) for output in stock["outputs"].values()}) > REQUESTS // 2
    return Setup(model, dtype if ON_GPU else "float32", asks, stock)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, served in float16."""
    return make_random_model(tmp_path_factory.mktemp("half"), head_dim=64)


@pytest.fixture(scope="module")
def half(small: Path) -> Setup:
    return make_setup(small, "float16")


@pytest.fixture(scope="module")
def bfloat(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(
        make_random_model(tmp_path_factory.mktemp("bfloat"), head_dim=128), "bfloat16"
    )


def check_compacted(result: dict[str, Any], compactions: int) -> None:
    assert result["backends"] == ["CompactionCUDABackend"]
    assert result["compactions"] >= compactions and not result["failures"]
    assert result["used_blocks"] == 0
    assert not result["compiled"], "in the middle of serving"


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("runner", ["v2", "v1"])
def test_identity(half, runner, eager):
    result = half.run(runner, kv_compaction=IDENTITY, options={"enforce_eager": eager})
    where = "vllm.v1.worker." + ("gpu" if ON_GPU else "cpu")
    assert result["runner"].startswith(f"{where}." if runner == "v2" else where)
    assert result["scheduler"] == "CompactionAsyncScheduler"
    assert (result["graphs"] > 0) == (not eager and ON_GPU)
    check_compacted(result, compactions=REQUESTS // 3)
    half.check_parity(result)


def test_identity_in_bfloat16_without_async_scheduling(bfloat):
    result = bfloat.run(kv_compaction=IDENTITY, options={"async_scheduling": False})
    assert result["scheduler"] == "CompactionScheduler"
    check_compacted(result, compactions=REQUESTS // 3)
    bfloat.check_parity(result)


def test_preemption(half):
    result = half.run(kv_compaction=IDENTITY, options={"num_gpu_blocks_override": 65})
    check_compacted(result, compactions=REQUESTS // 3)
    half.check_parity(result)


def test_nothing_compacted(half):
    result = half.run(kv_compaction={"threshold": 1900})
    assert result["compactions"] == 0 and result["graphs"] > 0
    half.check_parity(result)


@pytest.mark.parametrize("runner", ["v2", "v1"])
def test_a_quarter_frees_blocks(small, runner):
    asks = [
        driver.Ask(driver.random_prompt(random.Random(i), 700 + 90 * i), 60, arrives=3 * i)
        for i in range(8)
    ]
    compaction = {"ratio": 0.25, "threshold": 256, "recent_tokens": 32}
    result = serve(small, "float16", asks, runner, kv_compaction=compaction)
    check_compacted(result, compactions=8)
    assert result["blocks_freed"] >= 8 * 10  # of 22 blocks and more per sequence
    assert all(len(output) == 60 for output in result["outputs"].values())


@pytest.mark.parametrize("runner", ["v2", "v1"])
def test_on_policy(half, runner):
    """Layers are fitted between the graphs of a step that also decodes."""
    compaction = {**IDENTITY, "queries": "repeat-prefill", "on_policy": True}
    result = half.run(runner, kv_compaction=compaction, options={"max_num_batched_tokens": 1024})
    check_compacted(result, compactions=8)  # many end before their passes
    assert result["graphs"] > 0 and result["reference_tokens"] > 0
    assert result["reference_shortfalls"] < result["compactions"]
    half.check_parity(result)


def test_merged_segments(small):
    asks = [driver.Ask(driver.random_prompt(random.Random(i), 900), 200) for i in range(4)]
    compaction = {"ratio": 0.25, "threshold": 256, "recent_tokens": 32, "merge_slots": 64}
    options = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 65}
    result = serve(small, "float16", asks, kv_compaction=compaction, options=options)
    check_compacted(result, compactions=8)
    assert result["merges"] >= 4
    assert all(len(output) == 200 for output in result["outputs"].values())


def test_ngram_speculation(small):
    asks = [driver.Ask(driver.random_prompt(random.Random(i), 40) * 6, 40) for i in range(6)]
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    options = {"speculative_config": speculative}
    stock = serve(small, "float16", asks, "v1")
    result = serve(small, "float16", asks, "v1", kv_compaction=IDENTITY, options=options)
    check_compacted(result, compactions=6)
    Setup(small, "float16", asks, stock).check_parity(result)
