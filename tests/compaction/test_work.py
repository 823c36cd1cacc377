"""What heads are expected to take, against what they do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vllm_am.compaction import compact, sample_queries
from vllm_am.compaction.statistics import attention_statistics
from vllm_am.compaction.work import fit_work, statistics_work

QUERIES, TOKENS, DIM = 1500, 1200, 64


@pytest.fixture(scope="module")
def head():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, TOKENS, DIM, generator=generator)
    return keys, values, torch.randn(1, QUERIES, DIM, generator=generator)


def multiplications(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def test_statistics(head):
    counted = multiplications(lambda: attention_statistics(*head, scale=DIM**-0.5))
    assert counted == statistics_work(QUERIES, TOKENS, DIM)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("slots", [16, 60, 240, 500])
def test_fits_within_a_factor(head, slots, sampled, monkeypatch):
    """Products only, of which the symmetric ones are halved; the solvers are not counted."""
    if sampled:
        monkeypatch.setattr(sample_queries, "FEWEST_QUERIES", 200)
        monkeypatch.setattr(sample_queries, "QUERIES_PER_SLOT", 2)
    statistics = attention_statistics(*head, scale=DIM**-0.5)
    counted = multiplications(lambda: compact(*head, budget=slots, statistics=statistics))
    assert 0.25 < counted / fit_work(QUERIES, TOKENS, slots, DIM) < 1.5


def test_what_is_not_fitted_costs_little():
    """Heads that keep more than half of their keys, or everything."""
    dear = fit_work(8192, 4096, 2048, 128)
    assert fit_work(8192, 4096, 2049, 128) < dear / 5
    assert fit_work(8192, 16384, 4097, 128) < fit_work(8192, 16384, 4096, 128) / 5
    assert fit_work(8192, 512, 512, 128) < fit_work(8192, 1024, 511, 128)
