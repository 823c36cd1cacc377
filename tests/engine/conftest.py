"""Fixtures of the engine tests: what stock vLLM answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import driver


@pytest.fixture(scope="session")
def mixed(tiny_model: Path) -> tuple[list[driver.Ask], dict[str, list[int]]]:
    """72 mixed requests, and stock vLLM's greedy outputs for them."""
    asks = driver.mixed_asks(72, seed=7)
    with driver.start(tiny_model) as engine:
        outputs = engine.run(asks)
    assert len({tuple(o) for o in outputs.values()}) > 36, "the model ignores its context"
    return asks, outputs
