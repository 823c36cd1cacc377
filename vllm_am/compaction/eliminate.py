"""Backward elimination on the mass: start from many candidates, drop the least useful, refit.

Greedy selection judges a key by what it adds to the few that are already there; elimination judges
it by what its loss would cost the many that are still there, so keys that stand for whole regions
survive. On the synthetic heads it beats OMP in both held-out errors at every
size (``tests/compaction/test_quality.py``), and it is a handful of bounded least-squares solves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Share of the candidates that survives a round: the fewer, the more of them are judged by a fit
#: that still leans on others about to go; the more, the more rounds.
SHRINK = 0.9
#: Gradient steps of a round, which only ranks keys and starts where the last one ended.
ROUND_STEPS = 30
#: Largest log weight while eliminating, the bound of OMP (paper, section 3).
MAX_LOG_WEIGHT = 7.0
#: Power iterations for the largest eigenvalue, and what they may fall short of it.
_POWER_STEPS, _EIGENVALUE_MARGIN = 8, 1.05


def eliminate(
    gram: Tensor,
    rhs: Tensor,
    budgets: Tensor,
    allowed: Tensor,
    *,
    shrink: float = SHRINK,
) -> Tensor:
    """The candidates that survive, bool [H, C], ``budgets[h]`` of each head.

    A round fits min |A w - 1|^2 over 0 <= w <= e^7 for the candidates left, and drops those with
    the smallest w_j |A_j|, which is what the fit loses at most with key j.

    Args:
        gram: [H, C, C] and rhs: [H, C], fp64, A'A and A'1 up to a common factor per head.
        budgets: [H] int64, at most the number of allowed candidates.
        allowed: [H, C] bool.
    """
    kept = allowed.clone()
    norm = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    # On a unit diagonal, where a weight x_j = w_j |A_j| is what the key is worth. Single precision
    # is enough to rank by, and half the memory to read in every step.
    scale = torch.where(norm > 0, norm, 1.0)
    unit = gram.div(scale.unsqueeze(2)).div_(scale.unsqueeze(1)).float()
    target = (rhs / scale).float()
    highest = math.exp(MAX_LOG_WEIGHT) * norm.float()
    worth = norm.float()  # all weights 1
    while True:
        counts = kept.sum(dim=1)
        active = (counts > budgets).nonzero().squeeze(1)
        if active.numel() == 0:
            return kept
        size = int(counts[active].max())
        # Survivors first, in their order.
        order = torch.argsort((~kept[active]).to(torch.uint8), dim=1, stable=True)[:, :size]
        left = kept[active].gather(1, order)
        # Whole rows first, then columns: one indexing by pairs is several times slower.
        rows = unit[active.unsqueeze(1), order]
        fitted = _fit(
            rows.gather(2, order.unsqueeze(1).expand(-1, size, -1)),
            target[active].gather(1, order) * left,
            highest[active].gather(1, order) * left,
            worth[active].gather(1, order) * left,
        )
        worth[active] = worth[active].scatter(1, order, fitted)
        fitted = fitted.masked_fill(~left, -1.0)
        useful = (fitted > 0).sum(dim=1)
        survivors = torch.minimum((counts[active] * shrink).floor().long(), useful)
        survivors = torch.maximum(survivors, budgets[active])
        # Ties (weight 0) go to the key with the larger norm.
        tie = norm[active].gather(1, order) * 1e-12
        best = torch.argsort(fitted + tie, dim=1, descending=True, stable=True)
        place = torch.empty_like(best).scatter_(1, best, torch.arange(size).expand_as(best))
        survives = left & (place < survivors.unsqueeze(1))
        kept[active] = kept[active].scatter(1, order, survives)


def _fit(gram: Tensor, rhs: Tensor, highest: Tensor, start: Tensor) -> Tensor:
    """About argmin 1/2 x'Gx - c'x over 0 <= x <= highest, [B, C]; G has a unit diagonal.

    Where ``highest`` is 0, ``rhs`` and ``start`` are too.

    Projected gradient steps with Nesterov's momentum, which starts anew whenever it leads uphill.
    A step reads G once; the Newton steps of ``solve_box``, which reach the optimum, factorise it.
    """
    # Start at the best multiple of the guess.
    curvature = (start * _times(gram, start)).sum(dim=1, keepdim=True)
    level = (start * rhs).sum(dim=1, keepdim=True) / torch.where(curvature > 0, curvature, 1.0)
    x = torch.minimum(level * start, highest)
    largest = rhs
    for _ in range(_POWER_STEPS):
        length = largest.norm(dim=1, keepdim=True)
        largest = _times(gram, largest / torch.where(length > 0, length, 1.0)) * (highest > 0)
    rate = largest.norm(dim=1, keepdim=True) * _EIGENVALUE_MARGIN
    rate = 1.0 / torch.where(rate > 0, rate, 1.0)
    ahead, momentum = x, torch.ones_like(rate)
    for _ in range(ROUND_STEPS):
        stepped = ahead - rate * (_times(gram, ahead) - rhs)
        stepped = torch.minimum(stepped.clamp_(min=0.0), highest)
        uphill = ((ahead - stepped) * (stepped - x)).sum(dim=1, keepdim=True) > 0
        following = (1.0 + (1.0 + 4.0 * momentum.square()).sqrt()) / 2.0
        ahead = stepped + torch.where(uphill, 0.0, (momentum - 1.0) / following) * (stepped - x)
        momentum = torch.where(uphill, 1.0, following)
        x = stepped
    return x


def _times(gram: Tensor, x: Tensor) -> Tensor:
    """[B, C, C], symmetric, [B, C] -> [B, C]; from the left, as bmm is four times slower at G x."""
    return torch.bmm(x.unsqueeze(1), gram).squeeze(1)
