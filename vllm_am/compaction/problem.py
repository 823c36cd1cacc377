"""What a method gets to see, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vllm_am.compaction.statistics import AttentionStatistics, unweighted


@dataclass(frozen=True)
class Problem:
    """What a method may look at to choose keys.

    Attributes:
        keys: [H, T, D]; values: [H, T, Dv]; queries: [H, N, D], as given by the caller.
        bias: [H, T] float32, -inf for keys that do not exist.
        scale: of the scores.
        group_size: query heads whose queries are pooled; N is group_size runs of positions.
        statistics: of ``queries`` over ``keys``, with the scores that the method asked for.
        candidates: per slot of the budget, that greedy selections screen keys down to; None for no
            screening.
        chunk_bytes: bound of temporaries.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    bias: Tensor
    scale: float
    group_size: int
    statistics: AttentionStatistics
    candidates: float | None
    chunk_bytes: int

    @property
    def present(self) -> Tensor:
        """[H, T] bool, the keys that exist."""
        return ~self.bias.isneginf()

    def heads(self, index: Tensor | slice) -> Problem:
        """The same problem for some of the heads."""
        statistics = self.statistics.heads(index)
        return Problem(
            self.keys[index],
            self.values[index],
            self.queries[index],
            self.bias[index],
            self.scale,
            self.group_size,
            statistics,
            self.candidates,
            self.chunk_bytes,
        )


@dataclass(frozen=True)
class Selection:
    """The keys that a method keeps.

    Attributes:
        indices: [H, width] int64: ascending, -1 behind each head's budget, never a missing key.
        anchored: [H, width] bool, slots that keep their original value whatever the value fit
            does to the others; None if there are none.
    """

    indices: Tensor
    anchored: Tensor | None = None


#: (problem, budgets [H], width) -> the ``budgets[h]`` keys that each head keeps.
Select = Callable[[Problem, Tensor, int], Selection]


def scores_of_present(problem: Problem, norm: str) -> Tensor:
    """[H, T] scores; absent keys are below present ones, even below those without any weight."""
    scores = unweighted(problem.statistics.scores[norm], problem.bias)
    return scores.masked_fill(~problem.present, -1.0)
