"""The heads that copy are found before anything is served, on every runner."""

from __future__ import annotations

import random

import pytest

from tests.engine import driver
from tests.engine.driver import Ask, random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Of the bundled model, by a forward pass of our own."""
    from benchmarks.quality.tensor_backend import copying_weights
    from benchmarks.recall.model import load
    from benchmarks.recall.recipe import BUNDLED

    return copying_weights(load(BUNDLED.model)).tolist()


@pytest.mark.parametrize(
    "more", [{}, {"v2": True}, {"cuda_backend": True}], ids=["v1", "v2", "cuda-path"]
)
def test_the_bundled_models_heads(expected, more):
    from benchmarks.recall.recipe import BUNDLED

    case = {
        "model": str(BUNDLED.model),
        "kv_compaction": {"ratio": 0.1, "threshold": 256},
        "asks": [{"prompt": random_prompt(random.Random(0), 600), "max_tokens": 4}],
        "options": {"max_model_len": 1024, "num_gpu_blocks_override": 101},
        **more,
    }
    result = driver.run_case(case)
    assert result["compactions"] == 1 and result["used_blocks"] == 0
    assert result["head_weights"] == pytest.approx(expected, rel=0.02)
    assert max(expected) > 3 and min(expected) == 1, "some copy, some do not"


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"budgets": "global"}, {}),
        ({"budgets": "uniform"}, {}),
        ({}, {"max_num_batched_tokens": 60, "max_num_seqs": 8}),
    ],
    ids=["global", "uniform", "no-room"],
)
def test_all_heads_alike(tiny_model, config, options):
    """Where the user wants that, and where nothing can be found out; everything works."""
    ask = Ask(random_prompt(random.Random(0), 600), 4)
    with driver.start(tiny_model, {"ratio": 0.1, "threshold": 256, **config}, **options) as engine:
        assert engine.worker._compaction.fitting.head_weights is None
        engine.run([ask])
        assert engine.totals.compactions == 1 and not engine.totals.failures
