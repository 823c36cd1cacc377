"""The registry of compaction methods: how keys are chosen, and which fits follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vllm_am.compaction.fit_bias import LOG_WEIGHT_BOUNDS
from vllm_am.compaction.select_keys import top_keys
from vllm_am.compaction.statistics import AttentionStatistics


@dataclass(frozen=True)
class Problem:
    """What a method may look at to choose keys.

    Attributes:
        keys: [H, T, D]; values: [H, T, Dv]; queries: [H, N, D], as given by the caller.
        bias: [H, T] float32, -inf for keys that do not exist.
        scale: of the scores.
        statistics: of ``queries`` over ``keys``, with the scores that the method asked for.
        chunk_bytes: bound of temporaries.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    bias: Tensor
    scale: float
    statistics: AttentionStatistics
    chunk_bytes: int


#: (problem, budgets [H], width) -> indices [H, width]: ascending, -1 behind each head's budget,
#: never a key whose bias is -inf.
Selection = Callable[[Problem, Tensor, int], Tensor]


@dataclass(frozen=True)
class Method:
    """Attributes:
    name: as given to ``compact(method=...)``.
    select: chooses the keys.
    norms: scores that ``select`` needs (see ``statistics.SCORE_NORMS``).
    log_weight_bounds: of the bias fit, relative to the bias carried by the key; None = no fit.
    fits_values: whether values are fitted or copied.
    """

    name: str
    select: Selection
    norms: tuple[str, ...]
    log_weight_bounds: tuple[float, float] | None
    fits_values: bool


def _highest_attention(problem: Problem, budgets: Tensor, width: int) -> Tensor:
    """Top keys by root-mean-square attention weight over the queries (paper, section 3)."""
    scores = problem.statistics.scores["rms"]
    # Absent keys score below present ones, also below those whose weight underflows to zero.
    return top_keys(scores.masked_fill(problem.bias.isneginf(), -1.0), budgets, width)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="highest-attention",
            select=_highest_attention,
            norms=("rms",),
            log_weight_bounds=LOG_WEIGHT_BOUNDS,
            fits_values=True,
        ),
    )
}
