"""How much arithmetic a head takes, for those who ration time: estimates, in multiplications."""

from __future__ import annotations

from vllm_am.compaction.compact import LARGE_SHARE, LARGE_SLOTS, MOST_FITTED_SLOTS
from vllm_am.compaction.sample_queries import sample_size

#: Of the solvers, in ``t^3`` of a head of t slots: two factorisations (1/3 each), the triangular
#: products of the box solver, its steps. Counted from ``benchmarks/gpu_cost``, not derived.
_SOLVERS = 3.0
#: Products of queries and kept keys: for the bias, for the values, for the errors.
_PASSES = 3


def statistics_work(queries: int, tokens: int, dim: int) -> float:
    """Multiplications of the statistics of one head: scores and outputs.

    Args:
        queries: reference queries of the head, N.
        tokens: keys of it, T.
        dim: head size, D.
    """
    return 2.0 * queries * tokens * dim


def fit_work(queries: int, tokens: int, slots: int, dim: int) -> float:
    """Multiplications of the fit of one head to so many slots, its statistics known.

    Gram matrices of the bias and of the values, ``n t^2`` each with symmetry left unused for the n
    queries that are read (:func:`~vllm_am.compaction.sample_queries.sample_size`), the solvers
    behind them, and the products of queries and kept keys. A head whose keys are kept as they are
    (see :func:`vllm_am.compaction.compact`) has only products.
    """
    fitted = slots <= min(max(LARGE_SLOTS, LARGE_SHARE * tokens), MOST_FITTED_SLOTS)
    if not fitted or slots >= tokens:
        return _PASSES * 2.0 * sample_size(queries, 0) * slots * dim
    read = sample_size(queries, slots)
    choice = queries * slots * dim if read < queries else 0.0
    passes = _PASSES * 2.0 * read * slots * dim + choice
    return passes + 2.0 * read * slots**2 + _SOLVERS * slots**3
