"""The bounded least-squares solver against scipy, and the mass fit built on it."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from tests.compaction.synthetic import random_problem
from vllm_am.compaction import fit_bias as fit_bias_module
from vllm_am.compaction.fit_bias import LOG_WEIGHT_BOUNDS, TOLERANCE, fit_bias, solve_box

LO, HI = math.exp(-3), math.exp(3)


def normal_equations(A):
    return A.mT @ A / A.shape[-2], A.mean(-2)


def objective(A, x):
    return 0.5 * (A @ x - 1).square().mean().item()


def scipy_optimum(A, lo, hi):
    method = "bvls" if A.shape[1] <= 64 else "trf"
    target = np.ones(A.shape[0])
    solved = lsq_linear(A.numpy(), target, (lo, hi), method=method, tol=1e-14, max_iter=1000)
    return objective(A, torch.from_numpy(np.clip(solved.x, lo, hi)))


def softmax_design(n, t, temperature=3.0, rank=None, seed=0):
    """Columns of an attention matrix [n, t] over 3t keys: the problems that occur."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or t
    a = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    b = torch.randn(rank, 3 * t, generator=generator, dtype=torch.float64)
    return torch.softmax(temperature * a @ b / math.sqrt(rank), 1)[:, :t]


def hilbert(n, t):
    return 1 / (torch.arange(n)[:, None] + torch.arange(t)[None] + 1.0).double()


def duplicated(n, t):
    half = softmax_design(n, (t + 1) // 2)
    return torch.cat([half, half], 1)[:, :t]


def badly_scaled(n, t):
    return softmax_design(n, t) * torch.logspace(-6, 0, t, dtype=torch.float64)


DESIGNS = {
    "attention": softmax_design,
    "flat attention": lambda n, t: softmax_design(n, t, temperature=0.2),
    "low rank": lambda n, t: softmax_design(n, t, rank=max(1, t // 8)),
    "fewer queries than keys": lambda n, t: softmax_design(max(1, t // 2), t),
    "duplicated keys": duplicated,
    "scales over six decades": badly_scaled,
    "hilbert": hilbert,
}


@pytest.mark.parametrize("t", [1, 2, 7, 50, 150])
@pytest.mark.parametrize("design", DESIGNS)
def test_optimum_of_an_independent_solver(design, t):
    A = DESIGNS[design](400, t)
    gram, rhs = normal_equations(A)
    solution = solve_box(gram[None], rhs[None], LO, HI)
    x = solution.x[0]
    assert (x >= LO).all() and (x <= HI).all()
    assert solution.kkt_residual[0] <= TOLERANCE
    assert objective(A, x) <= scipy_optimum(A, LO, HI) + 1e-10


@pytest.mark.parametrize(("lo", "hi"), [(0.0, math.inf), (1.0, 1.0), (0.5, 0.5001), (1e-12, 1e4)])
def test_other_bounds(lo, hi):
    A = softmax_design(300, 40)
    gram, rhs = normal_equations(A)
    solution = solve_box(gram[None], rhs[None], lo, hi)
    assert (solution.x >= lo).all() and (solution.x <= hi).all()
    assert solution.kkt_residual[0] <= TOLERANCE
    if lo < hi:
        assert objective(A, solution.x[0]) <= scipy_optimum(A, lo, hi) + 1e-10


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    t=st.integers(1, 40),
    rows=st.integers(1, 160),
    rank=st.integers(1, 40),
    log_temperature=st.floats(-3, 3),
    seed=st.integers(0, 10_000),
    single=st.booleans(),
)
def test_always_converges(t, rows, rank, log_temperature, seed, single):
    """Near-singular and singular problems too, and Gram matrices that fp32 made indefinite."""
    A = softmax_design(rows, t, 2**log_temperature, rank, seed)
    gram, rhs = normal_equations(A.float() if single else A)
    solution = solve_box(gram.double()[None], rhs.double()[None], LO, HI)
    assert solution.x.isfinite().all()
    assert (solution.x >= LO).all() and (solution.x <= HI).all()
    assert solution.kkt_residual[0] <= 10 * TOLERANCE
    if not single:
        # What the residual guarantees: f(x) - f* <= g'(x - x*), and no |x - x*| exceeds the box.
        widths = gram.diagonal().sqrt().sum() * (HI - LO)
        gap = objective(A, solution.x[0]) - scipy_optimum(A, LO, HI)
        assert gap <= solution.kkt_residual[0] * widths + 1e-10


def test_batch_equals_one_by_one():
    pairs = [normal_equations(softmax_design(200, 30, seed=seed)) for seed in range(5)]
    gram, rhs = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    together = solve_box(gram, rhs, LO, HI)
    for i in range(5):
        alone = solve_box(gram[i : i + 1], rhs[i : i + 1], LO, HI)
        torch.testing.assert_close(together.x[i], alone.x[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [7, 30, 77])
def test_neighbours_do_not_change_a_bit(t):
    """Heads finish after different numbers of steps; who else is still at work must not matter."""
    pairs = [normal_equations(make(200, t)) for make in DESIGNS.values()]
    gram, rhs = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    together = solve_box(gram, rhs, LO, HI)
    assert len(set(together.iterations.tolist())) > 2
    for i in range(len(pairs)):
        others = [j for j in range(len(pairs)) if j != i]
        assert torch.equal(solve_box(gram[others], rhs[others], LO, HI).x, together.x[others])
        muted = gram.clone(), rhs.clone()
        muted[0][others], muted[1][others] = 0, 0
        assert torch.equal(solve_box(*muted, LO, HI).x[i], together.x[i])


def test_one_of_two_goes_on_alone():
    """With two heads the one still at work is once again as large a batch as both were."""
    pairs = [normal_equations(make(200, 50)) for make in DESIGNS.values()]
    gram, rhs = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    together = solve_box(gram, rhs, LO, HI)
    apart = 0
    for i, j in itertools.permutations(range(len(pairs)), 2):
        two = solve_box(gram[[i, j]], rhs[[i, j]], LO, HI)
        assert torch.equal(two.x, together.x[[i, j]])
        apart += int(two.iterations.diff().abs() > 2)
    assert apart > 2


def test_iterations_stay_few_on_attention():
    """Heads of ordinary size take a handful of Newton steps; hundreds would mean a broken step."""
    pairs = [normal_equations(softmax_design(600, 100, seed=seed)) for seed in range(8)]
    gram, rhs = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    assert solve_box(gram, rhs, LO, HI).iterations.max() <= 12


def test_unused_variables_are_one_and_touch_nothing():
    gram, rhs = normal_equations(softmax_design(100, 10))
    padded_gram, padded_rhs = torch.zeros(1, 14, 14).double(), torch.zeros(1, 14).double()
    padded_gram[0, 2:12, 2:12], padded_rhs[0, 2:12] = gram, rhs
    padded = solve_box(padded_gram, padded_rhs, LO, HI)
    plain = solve_box(gram[None], rhs[None], LO, HI)
    torch.testing.assert_close(padded.x[0, 2:12], plain.x[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(padded.x[0, [0, 1, 12, 13]], torch.ones(4).double())
    nothing = solve_box(torch.zeros(2, 0, 0).double(), torch.zeros(2, 0).double(), LO, HI)
    assert nothing.x.shape == (2, 0) and torch.equal(nothing.kkt_residual, torch.zeros(2).double())


def mass_problem(H=3, T=80, N=300, D=64, t=20):
    keys, _, queries = random_problem(H, T, N, D)
    lse = torch.logsumexp(queries @ keys.mT / math.sqrt(D), 2)
    return keys[:, :t].contiguous(), queries, lse


def test_museum_11_fit_is_the_joint_optimum_of_the_relative_mass_error():
    """Not one log-ratio per key, and one shift on both sides: an independent solver must agree."""
    keys, queries, lse = mass_problem()
    fit = fit_bias(keys, torch.zeros(3, 20), queries, lse, scale=0.125)
    for head in range(3):
        scores = queries[head].double() @ keys[head].double().T / 8
        A = torch.exp(scores - lse[head].double().unsqueeze(1))
        assert objective(A, fit.bias[head].double().exp()) <= scipy_optimum(A, LO, HI) + 1e-7


def test_carried_bias_is_part_of_the_total():
    """b_S + log w: moving a constant from the scores into the carried bias changes nothing else."""
    keys, queries, lse = mass_problem()
    plain = fit_bias(keys, torch.zeros(3, 20), queries, lse, scale=0.125)
    carried = fit_bias(keys, torch.full((3, 20), 1.5), queries, lse + 1.5, scale=0.125)
    torch.testing.assert_close(carried.bias, plain.bias + 1.5, rtol=1e-4, atol=1e-4)


def test_padding_and_ragged_heads():
    keys, queries, lse = mass_problem()
    bias = torch.zeros(3, 20)
    bias[0, 5:], bias[1] = -torch.inf, -torch.inf
    fit = fit_bias(keys, bias, queries, lse, scale=0.125)
    alone = fit_bias(keys[:1, :5], bias[:1, :5], queries[:1], lse[:1], scale=0.125)
    torch.testing.assert_close(fit.bias[:1, :5], alone.bias, rtol=1e-4, atol=1e-4)
    assert fit.bias[0, 5:].isneginf().all() and fit.bias[1].isneginf().all()
    assert fit.bias[2].isfinite().all()
    assert not fit.no_mass.any()


def test_bounds_are_relative_to_the_carried_bias():
    keys, queries, lse = mass_problem(t=1)
    fit = fit_bias(keys, torch.full((3, 1), -2.0), queries, lse + 10, scale=0.125)
    torch.testing.assert_close(fit.bias, torch.full((3, 1), 1.0))  # -2 + 3


def test_keys_that_no_query_sees():
    keys, queries, lse = mass_problem()
    lse[1] = 1e4
    fit = fit_bias(keys, torch.zeros(3, 20), queries, lse, scale=0.125)
    assert fit.no_mass.tolist() == [False, True, False]
    assert torch.equal(fit.bias[1], torch.zeros(20))


@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 1 << 30])
def test_block_size_does_not_matter(chunk_bytes, monkeypatch):
    monkeypatch.setattr("vllm_am.compaction.streaming._GRAM_BYTES", {"cpu": 0})
    keys, queries, lse = mass_problem()
    fit = fit_bias(keys, torch.zeros(3, 20), queries, lse, scale=0.125, chunk_bytes=chunk_bytes)
    expected = fit_bias(keys, torch.zeros(3, 20), queries, lse, scale=0.125)
    torch.testing.assert_close(fit.bias, expected.bias, rtol=1e-4, atol=1e-4)


def test_defaults():
    assert LOG_WEIGHT_BOUNDS == (-3.0, 3.0)  # paper, highest-attention variant
    assert TOLERANCE == 1e-7 and fit_bias_module.MAX_ITERATIONS == 200  # our measurement
