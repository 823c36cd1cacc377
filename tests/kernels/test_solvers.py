"""The solvers' launchers against their plain-torch references, on the GPU if there is one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tests.compaction.test_fit_bias import DESIGNS, HI, LO, normal_equations, softmax_design
from vllm_am.compaction import fit_bias, fit_values
from vllm_am.compaction.fit_bias import TOLERANCE
from vllm_am.kernels import native
from vllm_am.kernels.solve_box import (
    NATIVE_MAX_UNKNOWNS,
    WORKSPACE_BYTES,
    agree,
    plan_launch,
    solve_box,
    workspace_bytes,
)
from vllm_am.kernels.solve_values import solve_values

# Shared memory per block and multiprocessor in bytes (CUDA programming guide).
H200 = SimpleNamespace(
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)
A100 = SimpleNamespace(
    multi_processor_count=108,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=163 << 10,
    shared_memory_per_multiprocessor=164 << 10,
)


def value_problem(heads, t, width, dtype=torch.float64, n=None):
    generator = torch.Generator().manual_seed(100 * heads + t)
    x = torch.rand(heads, n or 3 * t, t, generator=generator, dtype=torch.float64)
    y = torch.randn(heads, n or 3 * t, width, generator=generator, dtype=torch.float64)
    prior = torch.randn(heads, t, width, generator=generator, dtype=torch.float64)
    ridge = torch.logspace(-6, -2, heads, dtype=torch.float64)
    return (part.to(dtype) for part in (x.mT @ x, x.mT @ y, prior, ridge))


def test_values_of_one_panel_and_of_several(device):
    gram, rhs, prior, ridge = (part.to(device) for part in value_problem(3, 70, 5))
    expected, _ = fit_values.solve_values(gram, rhs, prior, ridge)
    before = gram.clone()
    for panel in (1, 16, 69, 70, 128):
        solution, singular = solve_values(gram, rhs, prior, ridge, panel=panel)
        assert not singular.any()
        torch.testing.assert_close(solution, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(gram, before)


@pytest.mark.parametrize("lengths", [[1, 40, 33, 0, 40], [0, 0, 0, 0, 0], [40, 7, 8, 9, 40]])
def test_values_of_ragged_heads(lengths, device):
    gram, rhs, prior, ridge = value_problem(5, 40, 6)
    for head, length in enumerate(lengths):
        gram[head, length:], gram[head, :, length:], rhs[head, length:] = 0.0, 0.0, 0.0
    gram, rhs, prior, ridge = (part.to(device) for part in (gram, rhs, prior, ridge))
    expected, _ = fit_values.solve_values(gram, rhs, prior, ridge)
    solution, singular = solve_values(gram, rhs, prior, ridge, lengths=lengths, panel=8)
    assert not singular.any()
    torch.testing.assert_close(solution, expected, rtol=1e-9, atol=1e-9)
    for head, length in enumerate(lengths):
        assert torch.equal(solution[head, length:], prior[head, length:])
    full, _ = solve_values(gram, rhs, prior, ridge, panel=8)
    torch.testing.assert_close(full, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", ["nan", "inf in rhs", "indefinite", "nan in prior"])
@pytest.mark.parametrize("lengths", [None, [40, 20, 40]])
def test_museum_13_bad_heads_are_flagged_and_leave_the_others_alone(bad, lengths, device):
    gram, rhs, prior, ridge = (part.to(device) for part in value_problem(3, 40, 4))
    if lengths:
        gram[1, 20:], gram[1, :, 20:], rhs[1, 20:] = 0.0, 0.0, 0.0
    good, _ = solve_values(gram, rhs, prior, ridge, lengths=lengths, panel=16)
    if bad == "nan":
        gram[1, 3, 7] = gram[1, 7, 3] = torch.nan
    elif bad == "inf in rhs":
        rhs[1, 3, 0] = torch.inf
    elif bad == "nan in prior":
        prior[1, 3, 0] = torch.nan
    else:
        gram[1, 18, 19] = gram[1, 19, 18] = 1e6  # in the second panel
    solution, singular = solve_values(gram, rhs, prior, ridge, lengths=lengths, panel=16)
    assert singular.tolist() == [False, True, False]
    assert torch.equal(solution[1], torch.zeros_like(solution[1]))
    assert torch.equal(solution[[0, 2]], good[[0, 2]])


def test_values_of_rank_deficient_heads(device):
    """Fewer queries than slots: the ridge decides, and the normal equations still hold."""
    gram, rhs, prior, ridge = (part.to(device) for part in value_problem(2, 50, 3, n=10))
    solution, singular = solve_values(gram, rhs, prior, ridge, panel=16)
    assert not singular.any()
    shift = (ridge * gram.diagonal(dim1=1, dim2=2).mean(1)).view(-1, 1, 1)
    residual = gram @ solution + shift * (solution - prior) - rhs
    assert residual.abs().max() <= 1e-9 * rhs.abs().max()


def test_values_of_nothing(device):
    empty = torch.zeros(2, 0, 0, device=device).double()
    solution, singular = solve_values(empty, empty[..., :0], torch.zeros_like(empty), 0.1)
    assert solution.shape == (2, 0, 0) and not singular.any()
    with pytest.raises(ValueError, match="lengths"):
        solve_values(empty, empty, empty, 0.1, lengths=[1, 0])


def test_box_without_a_gpu_is_the_reference():
    gram, rhs = (part[None] for part in normal_equations(softmax_design(100, 12)))
    solution = solve_box(gram, rhs, LO, HI, tolerance=1e-9)
    expected = fit_bias.solve_box(gram, rhs, LO, HI, tolerance=1e-9)
    assert torch.equal(solution.x, expected.x)
    assert torch.equal(solution.iterations, expected.iterations)


@pytest.mark.parametrize("machine", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("size", [1, 31, 64, 205, 600, 1600, NATIVE_MAX_UNKNOWNS])
@pytest.mark.parametrize("batch", [1, 64, 288])
def test_launches_fit_the_machine(machine, size, batch):
    plan = plan_launch(batch, size, machine)
    blocks = plan.teams * plan.team_blocks
    assert plan.threads % 32 == 0 and 32 <= plan.threads <= 1024
    assert plan.shared_bytes + 2600 <= machine.shared_memory_per_block_optin
    assert plan.shared_bytes % 16 == 0
    assert 1 <= plan.teams <= batch
    assert blocks == 1 or blocks * workspace_bytes(size, plan.team_blocks) <= WORKSPACE_BYTES
    # All resident at once: they wait for each other.
    per_processor = min(
        2048 // plan.threads,
        machine.regs_per_multiprocessor // (64 * plan.threads),
        machine.shared_memory_per_multiprocessor // (plan.shared_bytes + 2600),
    )
    assert blocks <= machine.multi_processor_count * max(1, per_processor)
    if size == 205 and machine is H200 and batch > 64:
        assert plan.team_blocks == 1 and plan.shared_bytes >= 4 * 205 * 208  # the whole matrix
    if size >= 1600 and batch == 1:
        assert plan.team_blocks >= 20


def test_a_team_is_as_large_as_it_is_asked_to_be():
    for blocks in (1, 2, 7):
        assert plan_launch(3, 600, H200, team_blocks=blocks).team_blocks == blocks
    assert plan_launch(3, 600, H200, team_blocks=1000).team_blocks <= 132


def test_several_blocks_are_given_up_where_they_do_not_work(caplog):
    one, other = torch.ones(3), torch.zeros(3)

    def fails() -> torch.Tensor:
        raise RuntimeError("too many blocks in cooperative launch")

    assert agree(lambda: one, lambda: one) and not caplog.text
    assert not agree(lambda: other, lambda: one) and "do not find" in caplog.text
    assert not agree(fails, lambda: one) and "too many blocks" in caplog.text


def test_unknown_switch_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_AM_NATIVE", "cuda")
    native.operators.cache_clear()
    with pytest.raises(ValueError, match="VLLM_AM_NATIVE"):
        native.operators()
    native.operators.cache_clear()


@pytest.fixture(params=["aot", "nvrtc"])
def way(request, monkeypatch):
    """One of the two ways to the native operators."""
    monkeypatch.setenv("VLLM_AM_NATIVE", request.param)
    native.operators.cache_clear()
    if native.operators() is None:
        native.operators.cache_clear()
        pytest.skip(f"{request.param}: not available here")
    yield request.param
    native.operators.cache_clear()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("t", [1, 7, 50, 205, 300, 700])
def test_box_on_the_gpu(t, dtype, way, device):
    """Optimal by a residual computed here, on ragged batches of all kinds of problems."""
    pairs = [normal_equations(make(400, t)) for make in DESIGNS.values() for _ in range(3)]
    gram, rhs = (torch.stack(parts).to(device, dtype) for parts in zip(*pairs, strict=True))
    gram[1, t // 2 :], gram[1, :, t // 2 :], rhs[1, t // 2 :] = 0.0, 0.0, 0.0
    solution = solve_box(gram, rhs, LO, HI)
    x, gram, rhs = solution.x.double(), gram.double(), rhs.double()
    assert (x >= LO * (1 - 1e-6)).all() and (x <= HI * (1 + 1e-6)).all()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    used = diagonal > 0
    gradient = torch.einsum("hij,hj->hi", gram, x) - rhs
    best = torch.clamp(x - gradient / torch.where(used, diagonal, 1.0), LO, HI)
    residual = torch.where(used, diagonal.sqrt() * (x - best).abs(), 0.0).amax(dim=1)
    rounding = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(solution.kkt_residual.double(), residual, rtol=1e-2, atol=rounding)
    assert (solution.kkt_residual <= 100 * TOLERANCE).all()
    assert torch.equal(x[1, t // 2 :], torch.ones_like(x[1, t // 2 :]))


@pytest.mark.gpu
@needs_gpu
def test_box_on_the_gpu_does_not_depend_on_the_neighbours(way, device):
    pairs = [normal_equations(make(300, 90)) for make in DESIGNS.values()]
    gram, rhs = (torch.stack(parts).to(device) for parts in zip(*pairs, strict=True))
    together = solve_box(gram, rhs, LO, HI)
    gram[2, 4, 5] = gram[2, 5, 4] = math.nan
    broken = solve_box(gram, rhs, LO, HI)
    others = [head for head in range(len(pairs)) if head != 2]
    assert broken.kkt_residual[2].isnan() and broken.x[2].isfinite().all()
    assert torch.equal(broken.x[others], together.x[others])
    for head in others:
        alone = solve_box(gram[head : head + 1], rhs[head : head + 1], LO, HI)
        assert torch.equal(alone.x[0], together.x[head])


@pytest.mark.gpu
@needs_gpu
def test_the_gpu_is_not_waited_for(way, device):
    gram, rhs = (part[None].to(device) for part in normal_equations(softmax_design(300, 60)))
    solve_box(gram, rhs, LO, HI)  # loads and compiles
    problem = [part.to(device) for part in value_problem(2, 60, 4)]
    solve_values(*problem, panel=16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        solve_box(gram, rhs, LO, HI)
        solve_values(*problem, panel=16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
