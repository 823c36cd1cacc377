"""Backward elimination on the Gram matrix of the mass."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from tests.compaction.synthetic import random_problem, synthetic_head
from vllm_am.compaction import eliminate as module
from vllm_am.compaction.eliminate import eliminate


def design(keys, queries):
    """Attention weights [H, n, T] in fp64, and their normal equations (means over queries)."""
    A = torch.softmax(queries.double() @ keys.double().mT / math.sqrt(keys.shape[2]), 2)
    return A, A.mT @ A / A.shape[1], A.mean(1)


def reference_elimination(A, t, shrink):
    """The procedure as described, with scipy's solver on the whole design A [n, C]."""
    left = np.arange(A.shape[1])
    norm = np.linalg.norm(A, axis=0)
    while len(left) > t:
        solved = lsq_linear(A[:, left], np.ones(len(A)), (0, math.exp(7)), method="bvls")
        worth = solved.x * norm[left]
        worth[worth < 1e-6] = 0.0
        target = max(t, min(math.floor(shrink * len(left)), int((worth > 0).sum())))
        best = np.argsort(-(worth + 1e-12 * norm[left]), kind="stable")[:target]
        left = np.sort(left[best])
    return left.tolist()


def residual(A, kept):
    solved = lsq_linear(A[:, kept].numpy(), np.ones(len(A)), (0, math.exp(7)), method="bvls")
    return solved.cost


@pytest.mark.parametrize("t", [3, 12])
def test_agrees_with_a_plain_implementation(t):
    """Rounds are solved roughly, so a borderline key may differ; the fit may not be worse."""
    keys, _, queries, _ = synthetic_head(0, T=64, n=400)
    A, gram, rhs = design(keys, queries)
    marks = eliminate(gram, rhs, torch.tensor([t]), torch.ones(1, 64, dtype=torch.bool))
    kept = marks[0].nonzero().flatten().tolist()
    expected = reference_elimination(A[0].numpy(), t, module.SHRINK)
    assert len(kept) == t
    assert len(set(kept) & set(expected)) >= t - 1 - t // 10
    assert residual(A[0], kept) <= 1.1 * residual(A[0], expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), heads=st.integers(1, 4), columns=st.integers(1, 30), seed=st.integers(0, 99))
def test_any_budget_and_any_candidates(data, heads, columns, seed):
    keys, _, queries = random_problem(heads, columns, 60, 8, seed)
    _, gram, rhs = design(keys, queries)
    sizes = st.lists(st.integers(0, columns), min_size=heads, max_size=heads)
    existing = torch.tensor(data.draw(sizes))
    allowed = torch.arange(columns) < existing.unsqueeze(1)
    gram = gram * (allowed.unsqueeze(1) & allowed.unsqueeze(2))
    rhs = rhs * allowed
    budgets = torch.minimum(torch.tensor(data.draw(sizes)), existing)
    kept = eliminate(gram, rhs, budgets, allowed)
    assert torch.equal(kept.sum(1), budgets)
    assert not (kept & ~allowed).any()


def test_no_information_keeps_the_first_keys():
    zeros = torch.zeros(1, 8, 8).double()
    kept = eliminate(zeros, zeros[:, 0], torch.tensor([3]), torch.ones(1, 8, dtype=torch.bool))
    assert kept.tolist() == [[True] * 3 + [False] * 5]


def test_defaults():
    assert module.SHRINK == 0.9  # our measurement, see eliminate.py
    assert module.MAX_LOG_WEIGHT == 7.0  # paper, section 3: the bound of OMP
    assert module.ROUND_STEPS == 30  # our measurement
