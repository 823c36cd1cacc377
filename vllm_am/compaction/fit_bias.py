"""The mass fit: how many original keys each kept key stands for.

With A_ij = exp(s_ij - lse_i), the weight that query i gave to kept key j in the *original* cache,
a weight w_j per kept key should restore the mass of every query:

    w = argmin  1/n sum_i (sum_j A_ij w_j - 1)^2    subject to  lo <= w_j <= hi,

and the kept key's new bias is its old one plus log w_j. This is AM's mass fit (paper, section 3)
with each query's row divided by its mass. The paper's rows are shifted by the row's maximum only,
so diffuse queries dominate there; on our synthetic heads the relative form has a smaller held-out
mass error, and it needs no shift that could differ between the two sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_am.compaction.accelerate import accelerated_by
from vllm_am.compaction.gram import gram_matrix
from vllm_am.compaction.streaming import (
    DEFAULT_CHUNK_BYTES,
    accumulation_dtype,
    gram_blocks,
    head_blocks,
    pause_point,
    row_blocks,
)

#: Bounds of log w for kept keys of highest attention (paper, section 3; reference configuration).
LOG_WEIGHT_BOUNDS = (-3.0, 3.0)

#: Solved to this KKT residual: A itself is rounded to 1e-7 in fp32. Fits of real size need 3 to 10
#: iterations, nearly singular ones (all keys alike) up to 100.
TOLERANCE = 1e-7
MAX_ITERATIONS = 200

#: Least Levenberg damping, relative to the unit diagonal.
_MIN_DAMPING = 1e-10

#: Solves per iteration, see the loop in ``solve_box``.
_RELEASES = 4

#: Step lengths tried along the Newton arc, all in one matrix product.
_STEPS = tuple(2.0**-k for k in range(8))


@dataclass(frozen=True)
class BoxSolution:
    """Attributes: x [B, t]; kkt_residual [B] (see ``solve_box``); iterations [B] (int64)."""

    x: Tensor
    kkt_residual: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class BiasFit:
    """Attributes: bias [H, t] float32, -inf in padding; kkt_residual [H]; no_mass [H] bool."""

    bias: Tensor
    kkt_residual: Tensor
    no_mass: Tensor


@accelerated_by("vllm_am.kernels.solve_box", double=True)
def solve_box(
    gram: Tensor,
    rhs: Tensor,
    lo: float,
    hi: float,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    start: Tensor | None = None,
) -> BoxSolution:
    """argmin 1/2 x'Gx - c'x over lo <= x <= hi, for a batch of positive semidefinite G.

    Projected Newton: variables held at a bound by their gradient are left out, the rest take a
    damped Newton step along the projection arc. Every step is the best of eight step lengths and
    one projected gradient step, so the objective falls until the optimum, whatever the rank of G;
    the damping (Levenberg) rises while bounds cut the steps short and vanishes at the end. It runs
    on G scaled to a unit diagonal, which makes it invariant to the scale of the columns.

    Args:
        gram: [B, t, t]; a zero diagonal entry marks a variable that does not matter (padding, or
            a key that no query sees) and gets x = 1 clipped to the bounds.
        rhs: [B, t].
        lo, hi: 0 <= lo <= hi, hi may be infinite if G is positive definite.
        tolerance, max_iterations: stop at this residual, or after that many iterations.
        start: [B, t], a first guess; by default the best x whose elements are all alike.

    Returns:
        x within the bounds, and the residual max_j sqrt(G_jj) |x_j - clip(x_j - g_j / G_jj)| with
        g = Gx - c: how far the best change of a single weight would still move the fit, in units
        of the target (whose norm is 1 if G and c are means over queries).
    """
    batch, variables = rhs.shape
    # Whole cache lines per row: matrix products round by alignment, and a head's result must not
    # depend on its place among the heads that are still at work (nor on whether others failed).
    size = -(-variables // 8) * 8
    gram = torch.nn.functional.pad(gram, (0, size - variables, 0, size - variables))
    rhs = torch.nn.functional.pad(rhs, (0, size - variables))
    if start is not None:
        start = torch.nn.functional.pad(start, (0, size - variables))

    diagonal = gram.diagonal(dim1=1, dim2=2)
    used = diagonal > 0
    norm = torch.where(used, diagonal, 1.0).sqrt()  # [B, t]
    gram = gram / (norm.unsqueeze(2) * norm.unsqueeze(1))
    c = torch.where(used, rhs / norm, 0.0)
    lower, upper = lo * norm, hi * norm

    # Start at the best multiple of (1, ..., 1), all kept keys weighted alike, or of the guess.
    flat = torch.where(used, norm if start is None else start * norm, 0.0)
    curvature = _dot(flat, torch.bmm(gram, flat.unsqueeze(2)).squeeze(2))
    level = _dot(flat, c) / torch.where(curvature > 0, curvature, 1.0)
    x = torch.clamp(level.unsqueeze(1) * flat, lower, upper)
    x = torch.where(used, x, torch.clamp(norm, lower, upper))

    def residual(x: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        if size == 0:
            return x.new_zeros(x.shape[0])
        return (x - torch.clamp(x - gradient, lower, upper)).abs().amax(dim=1)

    gradient = torch.bmm(gram, x.unsqueeze(2)).squeeze(2) - c
    gradient = torch.where(used, gradient, 0.0)
    kkt = residual(x, gradient, lower, upper)
    iterations = torch.zeros(batch, dtype=torch.int64, device=rhs.device)
    steps = gram.new_tensor(_STEPS)
    # Row sums bound the largest eigenvalue: 1 / that is a gradient step that always descends.
    lipschitz = gram.abs().sum(2).amax(dim=1) if size else gram.new_ones(batch)

    damping = gram.new_full((batch,), _MIN_DAMPING)

    active = (kkt > tolerance).nonzero().squeeze(1)  # heads still at work
    for _ in range(max_iterations):
        if active.numel() == 0:
            break
        alone = active.numel() == 1 and batch > 1
        rows = active.repeat(2) if alone else active  # a batch of one is rounded differently
        G = gram if active.numel() == batch else gram[rows]
        b, at, g = c[rows], x[rows], gradient[rows]
        low, high, use = lower[rows], upper[rows], used[rows]

        held = ((at <= low) & (g > 0)) | ((at >= high) & (g < 0)) | ~use
        for _ in range(_RELEASES):
            step, damping[rows] = _solve_free(G, g, held, damping[rows])
            pause_point()
            # A variable that its gradient releases may be pushed back out by the others; clipping
            # it would spoil the step, so hold it after all and solve again.
            outward = ((at <= low) & (step > 0)) | ((at >= high) & (step < 0))
            outward &= ~held
            if not bool(outward.any()):
                break
            held |= outward

        newton = at.unsqueeze(1) - steps.view(1, -1, 1) * step.unsqueeze(1)
        descent = at - g / lipschitz[rows].unsqueeze(1)
        trials = torch.cat([newton, descent.unsqueeze(1)], dim=1)  # [b, 9, t]
        trials = torch.clamp(trials, low.unsqueeze(1), high.unsqueeze(1))
        images = torch.bmm(trials, G)
        # Objective relative to the current point, in a form that does not cancel: with
        # delta = trial - x,  f(trial) - f(x) = delta'(g + G trial - c) / 2.
        delta = trials - at.unsqueeze(1)
        change = 0.5 * (delta * (images - b.unsqueeze(1) + g.unsqueeze(1))).sum(2)
        change = torch.where(change.isnan(), torch.inf, change)
        best = change.argmin(dim=1)
        trial = torch.arange(len(rows), device=G.device)
        moved = change[trial, best] < 0
        # Where bounds cut most of the promised descent off, a more cautious step comes next.
        promised = -0.5 * _dot(step, g)
        gain = change[trial, best] / promised.clamp(max=-torch.finfo(G.dtype).tiny)
        factor = torch.where(gain < 0.25, 10.0, torch.where(gain > 0.75, 0.1, 1.0))
        damping[rows] = (damping[rows] * factor).clamp(_MIN_DAMPING, 1.0)

        at = torch.where(moved.unsqueeze(1), trials[trial, best], at)
        g = torch.where(moved.unsqueeze(1), torch.where(use, images[trial, best] - b, 0.0), g)
        x[rows], gradient[rows] = at, g
        kkt[rows] = residual(at, g, low, high)
        iterations[active] += 1
        # A head that cannot descend any more has reached the precision of its dtype.
        active = active[(moved & (kkt[rows] > tolerance))[: active.numel()]]

    x = torch.clamp(x / norm, lo, hi)[:, :variables]
    return BoxSolution(x, kkt, iterations)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[B, t], [B, t] -> [B], added up in an order that B does not change, unlike a sum's."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def _solve_free(
    gram: Tensor, gradient: Tensor, held: Tensor, damping: Tensor
) -> tuple[Tensor, Tensor]:
    """The damped Newton step (G_FF + damping I)^-1 g_F of the free variables; 0 for the held ones.

    Most variables of a large fit end at a bound, so only the free ones are factorised: heads are
    grouped by their number, rounded up to the full size, a half, a quarter and so on. Grouping by
    a head's own number keeps its arithmetic apart from its neighbours'.

    Returns the step [B, t] and the damping [B], raised where the Cholesky needed more.
    """
    size = held.shape[1]
    step, damping = torch.zeros_like(gradient), damping.clone()
    free_count = (~held).sum(dim=1)
    front = held.to(torch.uint8).argsort(dim=1, stable=True)  # free variables first
    width = size
    while True:
        smaller = -(-width // 16) * 8
        last = smaller == width  # 8, or 0 without variables
        group = free_count <= width
        if not last:
            group &= free_count > smaller
        heads = group.nonzero().squeeze(1)
        if heads.numel() > 0 and width > 0:
            chosen = front[heads, :width]
            free = (~held[heads].gather(1, chosen)).to(gram.dtype)
            # Whole rows first, then columns: one indexing by pairs is several times slower.
            rows = gram[heads.unsqueeze(1), chosen]
            block = rows.gather(2, chosen.unsqueeze(1).expand(-1, width, -1))
            block.mul_(free.unsqueeze(1)).mul_(free.unsqueeze(2))
            rhs = gradient[heads].gather(1, chosen) * free
            part, damping[heads] = _damped_solve(block, rhs, damping[heads])
            step[heads] = torch.zeros_like(step[heads]).scatter(1, chosen, part)
        if last:
            return step, damping
        width = smaller


def _damped_solve(matrix: Tensor, rhs: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(M + damping I)^-1 rhs per head; the damping is raised where the Cholesky needs more.

    Works in the memory of ``matrix``. Returns the solution (zero where even the largest damping
    fails) and the damping used.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    bare = diagonal.clone()
    solution, damping = torch.zeros_like(rhs), damping.clone()
    todo = torch.arange(len(rhs), device=rhs.device)
    while todo.numel() > 0:
        diagonal.copy_(bare + damping.unsqueeze(1))
        factor, info = torch.linalg.cholesky_ex(matrix if len(todo) == len(rhs) else matrix[todo])
        good = info == 0
        solved = torch.cholesky_solve(rhs[todo[good]].unsqueeze(2), factor[good])
        solution[todo[good]] = solved.squeeze(2)
        todo = todo[~good & (damping[todo] < 1.0)]
        damping[todo] *= 100.0
    return solution, damping


def fit_bias(
    keys: Tensor,
    bias: Tensor,
    queries: Tensor,
    lse: Tensor,
    *,
    scale: float,
    weights: Tensor | None = None,
    log_bounds: tuple[float, float] = LOG_WEIGHT_BOUNDS,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> BiasFit:
    """New total bias b_S + log w of the kept keys.

    Carrying b_S is what makes repeated compaction work: A contains exp(b_S) already, so log w is
    relative to it, and so are the bounds.

    Args:
        keys: [H, t, D], kept keys. bias: [H, t] float32, their bias so far, -inf in padding.
        queries: [H, n, D]. lse: [H, n], log mass of the queries over the original keys.
        weights: [n], of the queries' squares in the sum, at most 1; None is 1.
        log_bounds: bounds of log w.

    Returns:
        ``no_mass`` marks heads whose kept keys get no weight from any query.
    """
    lo, hi = (math.exp(bound) for bound in log_bounds)
    new_bias = bias.clone()
    kkt_residual = bias.new_zeros(len(bias))
    no_mass = torch.zeros_like(kkt_residual, dtype=torch.bool)
    for heads in gram_blocks(len(bias), bias.shape[1], chunk_bytes, bias.device):
        gram, rhs = mass_normal_equations(
            keys[heads],
            bias[heads],
            queries[heads],
            lse[heads],
            scale=scale,
            row_weights=weights,
            chunk_bytes=chunk_bytes,
        )
        solution = solve_box(gram, rhs, lo, hi)
        # In padding the weight is 1, and -inf + 0 stays -inf.
        new_bias[heads] += solution.x.log().to(bias.dtype)
        kkt_residual[heads] = solution.kkt_residual.to(bias.dtype)
        no_mass[heads] = ~(rhs > 0).any(dim=1)
    has_keys = ~bias.isneginf().all(dim=1)
    return BiasFit(new_bias, kkt_residual, has_keys & no_mass)


@accelerated_by("vllm_am.kernels.gram")
def mass_normal_equations(
    keys: Tensor,
    bias: Tensor,
    queries: Tensor,
    lse: Tensor,
    *,
    scale: float,
    row_weights: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """A'RA / r [H, t, t] and A'R1 / r [H, t] with R = diag(row_weights), r their sum.

    Products in the accumulation dtype, sums in fp64.

    Args:
        row_weights: [n], at most 1, of all heads; None is 1.
    """
    heads, size, _ = keys.shape
    rows = queries.shape[1]
    dtype = accumulation_dtype(keys, queries, lse)
    gram = keys.new_zeros(heads, size, size, dtype=torch.float64)
    rhs = keys.new_zeros(heads, size, dtype=torch.float64)
    row_bytes = size * dtype.itemsize
    for block in head_blocks(heads, row_bytes, chunk_bytes):
        k, b = keys[block].to(dtype), bias[block].to(dtype).unsqueeze(1)
        for chunk in row_blocks(rows, k.shape[0], row_bytes, chunk_bytes):
            q = queries[block, chunk].to(dtype) * scale
            weights = torch.bmm(q, k.transpose(1, 2))
            weights.add_(b).sub_(lse[block, chunk].unsqueeze(2)).exp_()
            if row_weights is None:
                rhs[block] += weights.sum(dim=1)
            else:
                root = row_weights[chunk].to(dtype).sqrt()
                weights *= root.unsqueeze(1)
                rhs[block] += torch.matmul(root, weights)
            gram[block] += gram_matrix(weights)
    total = rows if row_weights is None else row_weights.double().sum()
    return gram / total, rhs / total
