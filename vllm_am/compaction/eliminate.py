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

from vllm_am.compaction.fit_bias import solve_box

#: Share of the candidates that survives a round: the fewer, the more of them are judged by a fit
#: that still leans on others about to go; the more, the more rounds.
SHRINK = 0.8
#: Bounded solves stop early, as a round only ranks keys: solved to 1e-7 the errors are the same.
ROUND_TOLERANCE = 1e-4
ROUND_ITERATIONS = 12
#: Largest log weight while eliminating, the bound of OMP (paper, section 3).
MAX_LOG_WEIGHT = 7.0


def eliminate(
    gram: Tensor,
    rhs: Tensor,
    budgets: Tensor,
    allowed: Tensor,
    *,
    shrink: float = SHRINK,
) -> Tensor:
    """The candidates that survive, bool [H, C], ``budgets[h]`` of each head.

    A round solves min |A w - 1|^2 over 0 <= w <= e^7 for the candidates left, and drops those with
    the smallest w_j |A_j|, which is what the fit loses at most with key j.

    Args:
        gram: [H, C, C] and rhs: [H, C], fp64, A'A and A'1 up to a common factor per head.
        budgets: [H] int64, at most the number of allowed candidates.
        allowed: [H, C] bool.
    """
    kept = allowed.clone()
    norm = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    weights: Tensor | None = None
    while True:
        counts = kept.sum(dim=1)
        active = (counts > budgets).nonzero().squeeze(1)
        if active.numel() == 0:
            return kept
        size = int(counts[active].max())
        # Survivors first, in their order.
        order = torch.argsort((~kept[active]).to(torch.uint8), dim=1, stable=True)[:, :size]
        left = kept[active].gather(1, order)
        pairs = left.unsqueeze(2) & left.unsqueeze(1)
        part = gram[active.view(-1, 1, 1), order.unsqueeze(2), order.unsqueeze(1)] * pairs
        start = None if weights is None else weights[active].gather(1, order)
        solution = solve_box(
            part,
            rhs[active].gather(1, order) * left,
            0.0,
            math.exp(MAX_LOG_WEIGHT),
            tolerance=ROUND_TOLERANCE,
            max_iterations=ROUND_ITERATIONS,
            start=start,
        )
        worth = (solution.x * norm[active].gather(1, order)).masked_fill(~left, -1.0)
        useful = (worth > 0).sum(dim=1)
        target = torch.minimum((counts[active] * shrink).floor().long(), useful)
        target = torch.maximum(target, budgets[active])
        # Ties (weight 0) go to the key with the larger norm.
        tie = norm[active].gather(1, order) * 1e-12
        best = torch.argsort(worth + tie, dim=1, descending=True, stable=True)
        place = torch.empty_like(best).scatter_(1, best, torch.arange(size).expand_as(best))
        survives = left & (place < target.unsqueeze(1))
        kept[active] = kept[active].scatter(1, order, survives)
        if weights is None:
            weights = torch.zeros_like(rhs)
        weights[active] = weights[active].scatter(1, order, solution.x)
