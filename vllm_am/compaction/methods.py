"""The registry of compaction methods: how keys are chosen, and which fits follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from vllm_am.compaction import eviction
from vllm_am.compaction.candidates import candidates, kept_indices
from vllm_am.compaction.eliminate import eliminate
from vllm_am.compaction.fit_bias import LOG_WEIGHT_BOUNDS
from vllm_am.compaction.omp import Schedule, fast, progressive, pursue
from vllm_am.compaction.peaks import PeaksAndCoverage
from vllm_am.compaction.problem import Problem, Select, Selection, scores_of_present
from vllm_am.compaction.select_keys import members, top_keys

#: Bounds of log w where the selection weighs keys itself (paper, section 3: AM-OMP).
WIDE_LOG_WEIGHT_BOUNDS = (-7.0, 7.0)


@dataclass(frozen=True)
class Method:
    """Attributes:
    name: as given to ``compact(method=...)``.
    select: chooses the keys.
    norms: scores that ``select`` needs (see ``statistics.SCORE_NORMS``).
    log_weight_bounds: of the bias fit, relative to the bias carried by the key; None = no fit.
    fits_values: whether values are fitted or copied.
    alternatives: other methods; each head gets whichever has the least held-out error.
    """

    name: str
    select: Select
    norms: tuple[str, ...]
    log_weight_bounds: tuple[float, float] | None
    fits_values: bool
    alternatives: tuple[Method, ...] = ()

    @property
    def needed_norms(self) -> tuple[str, ...]:
        """Scores that the method or one of its alternatives needs, and the fits."""
        methods = self.alternatives or (self,)
        fitted = ("rms",) if self.fits else ()
        return tuple(dict.fromkeys([*fitted, *(norm for each in methods for norm in each.norms)]))

    @property
    def fits(self) -> bool:
        """Whether anything is fitted."""
        return self.fits_values or self.log_weight_bounds is not None


def _highest_attention(problem: Problem, budgets: Tensor, width: int) -> Selection:
    """Top keys by root-mean-square attention weight over the queries (paper, section 3)."""
    return Selection(top_keys(scores_of_present(problem, "rms"), budgets, width))


def select_by_pursuit(
    problem: Problem, budgets: Tensor, width: int, *, schedule: Schedule
) -> Selection:
    """AM-OMP (paper, section 3) among the candidates; see ``omp``."""
    indices = budgets.new_full((len(budgets), width), -1)
    for part in candidates(problem, budgets):
        allowed = part.indices >= 0
        order = pursue(part.gram, part.rhs, part.budgets, allowed, schedule)
        kept = members(order, allowed.shape[1])
        indices[part.heads] = kept_indices(part.indices, kept, width)
    return Selection(indices)


def select_by_elimination(problem: Problem, budgets: Tensor, width: int) -> Selection:
    """Backward elimination from the candidates; see ``eliminate``."""
    indices = budgets.new_full((len(budgets), width), -1)
    for part in candidates(problem, budgets):
        kept = eliminate(part.gram, part.rhs, part.budgets, part.indices >= 0)
        indices[part.heads] = kept_indices(part.indices, kept, width)
    return Selection(indices)


#: The first is ``peaks-and-coverage``. The others are for heads of another kind: diffuse ones,
#: those with few but high peaks, those that look keys up.
_COVERAGES = (
    PeaksAndCoverage("rms", 0.2, anchors=False),
    PeaksAndCoverage("rms", 0.5, anchors=False),
    PeaksAndCoverage("max", 0.2, anchors=False),
    PeaksAndCoverage("rms", 0.2, anchors=True),
)


def _covering(name: str, *coverages: PeaksAndCoverage) -> Method:
    """Peaks and coverage in one way, or per head in the best of several."""
    ways = tuple(
        Method(name, way, (way.norm,), WIDE_LOG_WEIGHT_BOUNDS, fits_values=True)
        for way in coverages
    )
    return ways[0] if len(ways) == 1 else replace(ways[0], alternatives=ways)


def _fitting(
    name: str, select: Select, log_weight_bounds: tuple[float, float] = WIDE_LOG_WEIGHT_BOUNDS
) -> Method:
    return Method(name, select, ("rms",), log_weight_bounds, fits_values=True)


def _evicting(name: str, select: Select, *norms: str) -> Method:
    return Method(name, select, norms, log_weight_bounds=None, fits_values=False)


#: Of heads that keep most of their keys anyway: all fitting methods know these scores.
AS_THEY_ARE = _evicting("as-they-are", _highest_attention, "rms")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _fitting("highest-attention", _highest_attention, LOG_WEIGHT_BOUNDS),
        _fitting("omp", partial(select_by_pursuit, schedule=progressive)),
        _fitting("omp-fast", partial(select_by_pursuit, schedule=fast)),
        _fitting("eliminate", select_by_elimination),
        _covering("peaks-and-coverage", *_COVERAGES[:1]),
        _covering("peaks-and-coverage-auto", *_COVERAGES),
        _evicting("evict-mean", eviction.highest_mean, "mean"),
        _evicting("evict-max", eviction.highest_max, "max"),
        _evicting("snapkv", eviction.snapkv),
        _evicting("recent", eviction.most_recent),
        _evicting("random", eviction.random_keys),
    )
}
