"""Candidate keys and the Gram matrix of their mass fit: what greedy selections work on.

The weights A_ij = exp(s_ij - lse_i) of all T keys have a Gram matrix that costs n T^2. Keys that no
query attends to cannot help the mass, so only the keys of highest rms attention are candidates, a
few per slot of the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_am.compaction.fit_bias import mass_normal_equations
from vllm_am.compaction.problem import Problem, scores_of_present
from vllm_am.compaction.select_keys import gather_keys, top_keys
from vllm_am.compaction.streaming import gram_blocks

#: Candidates per slot. Held-out output / mass errors on the synthetic head of seed 0, 51 of 1,024
#: keys: OMP .236/.228 with 2, .240/.214 with 4, .235/.206 with 8 or all.
CANDIDATES = 8.0
#: The Gram matrix costs their square, so there are no more than this many...
MOST_CANDIDATES = 2048
#: ... unless that were fewer than this many per slot.
LEAST_CANDIDATES = 2.0


@dataclass(frozen=True)
class Candidates:
    """Attributes, for some of the heads:
    heads: which, a slice of the problem's.
    indices: [h, C] int64, ascending keys, -1 in padding.
    gram: [h, C, C] fp64, A'A / n; zeros in padding.
    rhs: [h, C] fp64, A'1 / n.
    budgets: [h] int64.
    """

    heads: slice
    indices: Tensor
    gram: Tensor
    rhs: Tensor
    budgets: Tensor


def candidates(problem: Problem, budgets: Tensor) -> Iterator[Candidates]:
    """Candidates of all heads, in batches whose Gram matrices fit the memory bound.

    There are ``problem.candidates`` per slot of a head's budget [H], or all keys if that is None;
    not more than ``MOST_CANDIDATES`` where that leaves ``LEAST_CANDIDATES`` per slot.
    """
    existing = problem.present.sum(dim=1)
    counts = existing
    if problem.candidates is not None:
        least = min(LEAST_CANDIDATES, problem.candidates)
        wanted = (budgets * problem.candidates).ceil().long().clamp(max=MOST_CANDIDATES)
        wanted = torch.maximum(wanted, (budgets * least).ceil().long())
        counts = torch.minimum(wanted, existing)
    counts = torch.where(budgets > 0, counts, 0)
    size = int(counts.max()) if counts.numel() else 0
    indices = top_keys(scores_of_present(problem, "rms"), counts, size)
    for block in gram_blocks(len(budgets), size, problem.chunk_bytes, budgets.device):
        chosen = indices[block]
        bias = gather_keys(problem.bias[block].unsqueeze(2), chosen).squeeze(2)
        gram, rhs = mass_normal_equations(
            gather_keys(problem.keys[block], chosen),
            bias.masked_fill(chosen < 0, -torch.inf),
            problem.queries[block],
            problem.statistics.lse[block],
            scale=problem.scale,
            chunk_bytes=problem.chunk_bytes,
        )
        yield Candidates(block, chosen, gram, rhs, budgets[block])


def kept_indices(indices: Tensor, kept: Tensor, width: int) -> Tensor:
    """Keys of the kept candidates: indices [h, C] where kept [h, C] -> [h, width], -1 behind."""
    last = torch.iinfo(torch.int64).max
    ascending = indices.masked_fill(~kept, last).sort(dim=1).values
    ascending = torch.nn.functional.pad(ascending, (0, max(0, width - ascending.shape[1])))[
        :, :width
    ]
    count = kept.sum(dim=1, keepdim=True)
    beyond = torch.arange(width, device=indices.device) >= count
    return ascending.masked_fill(beyond, -1)
