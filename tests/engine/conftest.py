"""Fixtures of the engine tests: the tiny model, and what stock vLLM answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import driver
from tests.engine.models import make_random_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 whose outputs depend on the whole context."""
    return make_random_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def mixed(tiny_model: Path) -> tuple[list[driver.Ask], dict[str, list[int]]]:
    """72 mixed requests, and stock vLLM's greedy outputs for them."""
    asks = driver.mixed_asks(72, seed=7)
    with driver.start(tiny_model) as engine:
        outputs = engine.run(asks)
    assert len({tuple(o) for o in outputs.values()}) > 36, "the model ignores its context"
    return asks, outputs
