"""Attention peaks and coverage: keys for the queries that were seen, and for all others.

Peaks, the keys with the highest attention scores, answer questions about single facts. Coverage,
medoids of all other keys, carries the mass and the mean of everything else.

In ``benchmarks/results/quality.md`` (global budgets, ``context-rotated``) its errors on held-out
queries are smaller than those of ``highest-attention`` at every ratio, but its answers are not
better: as many facts at 10x, fewer at 20x and 50x, votes within one. Errors on queries that were
held out from the text are no guide to the answers: hence no choice between the two by default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_am.compaction.coverage import medoids
from vllm_am.compaction.problem import Problem, Selection, scores_of_present
from vllm_am.compaction.select_keys import members, top_keys

#: Least number of coverage slots of a head, as far as its budget allows (at most half of it): with
#: one or none per segment, answers that need the mass of many keys were lost.
MIN_COVERAGE = 4


@dataclass(frozen=True)
class PeaksAndCoverage:
    """A selection, as a function of the problem.

    Attributes:
        norm: score of the peaks, see ``statistics.SCORE_NORMS``.
        share: of the budget that goes to coverage.
        anchors: whether peaks keep their original values. Least squares blurs them at high ratios
            in heads that look single keys up.
    """

    norm: str
    share: float
    anchors: bool

    def __call__(self, problem: Problem, budgets: Tensor, width: int) -> Selection:
        covering = torch.maximum(
            (budgets * self.share).round().long(),
            torch.minimum(torch.full_like(budgets, MIN_COVERAGE), budgets // 2),
        )
        peaks = top_keys(scores_of_present(problem, self.norm), budgets - covering, width)
        taken = members(peaks, problem.bias.shape[1])
        cover = medoids(
            problem.keys,
            covering,
            problem.present & ~taken,
            chunk_bytes=problem.chunk_bytes,
        )
        # Peaks and medoids are disjoint; as scores they sort into one list of keys.
        indices = top_keys((taken | cover).float(), budgets, width)
        anchored = taken.gather(1, indices.clamp(min=0)) & (indices >= 0)
        return Selection(indices, anchored if self.anchors else None)
