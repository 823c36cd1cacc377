"""Fits of a worker: their warm-up."""

from __future__ import annotations

import pytest
import torch

from tests.engine import driver


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"merge_slots": 64, "budgets": "uniform"}], ids=["", "merge"])
def test_a_warm_up_fits_and_leaves_no_trace(tiny_model, mixed, more):
    """All its stages run, and what is served behind it is served as ever."""
    asks, expected = mixed
    config = {"ratio": 1.0, "threshold": 128, "recent_tokens": 16, **more}
    with driver.start(tiny_model, config) as engine:
        fitting = engine.worker._compaction.fitting
        written = []
        original = fitting._fit_heads

        def spy(heads, fit, progress):
            # A long span's are too large to be kept, and are computed again, by another kernel.
            assert not progress.statistics
            original(heads, fit, progress)
            pages = torch.cat(progress.lists)
            written.append((fit.merges, bool(fitting.kv.pages[pages].any())))

        fitting._fit_heads = spy
        assert fitting.warm_up(range(1, 11)) is None
        fitting._fit_heads = original
        assert written == [(False, True), (True, True)][: 1 + bool(more)]
        assert not fitting.running
        assert not fitting.kv.pages.any() and not any(pool.any() for pool in fitting.queries)
        if not more:
            assert engine.run(asks[:8]) == {k: expected[k] for k in map(str, range(8))}
