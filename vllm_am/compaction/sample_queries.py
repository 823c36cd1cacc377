"""Which of the reference queries a fit reads, once its keys are chosen.

A Gram matrix costs n t^2 for n queries, and a few queries per slot would determine it, but not any
few: a key that a single query looks for loses, with that query, all that keeps its weight up. What
tells such a query is its leverage, here with the Gram matrix's diagonal in place of the whole,

    l_i = sum_j A_ij^2 / sum_i' A_i'j^2,   A_ij = exp(s_ij - lse_i) for the kept keys j,

which is 1 for the only one that sees some key, and adds up to t over all. Half of the sample are
the queries of highest leverage, each for itself. The other half is drawn evenly from the rest in
the order of their leverage, and each stands for as many.

Answers are those of fits from all queries; as many queries by position alone cost two to six points
of the facts (``benchmarks/results/quality-sample.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_am.compaction.statistics import AttentionStatistics, attention_lse
from vllm_am.compaction.streaming import to_device

#: Queries that a fit of t slots reads, at least. Both were chosen on the bundled recall model, to
#: which half of the second costs two to four points of the facts; the validation model had no say.
QUERIES_PER_SLOT = 4
FEWEST_QUERIES = 2048
#: A sample that leaves less than this away is not worth the choice.
LEAST_SAVING = 0.25


@dataclass(frozen=True)
class ReferenceQueries:
    """Queries that a fit reads, and what the original cache does to them.

    Attributes:
        queries: [H, n, D]. lse: [H, n]. output: [H, n, Dv]. See ``AttentionStatistics``.
        weights: [n], at most 1: how many queries each stands for, relative to the others, in all
            heads; None where each stands for itself.
    """

    queries: Tensor
    lse: Tensor
    output: Tensor
    weights: Tensor | None = None


def sample_size(queries: int, slots: int) -> int:
    """How many of so many queries a fit of so many slots reads."""
    wanted = max(FEWEST_QUERIES, QUERIES_PER_SLOT * slots)
    return wanted if wanted <= (1 - LEAST_SAVING) * queries else queries


def sample_queries(
    keys: Tensor,
    bias: Tensor,
    scores: Tensor,
    queries: Tensor,
    statistics: AttentionStatistics,
    *,
    scale: float,
    chunk_bytes: int,
) -> ReferenceQueries:
    """The queries that a fit of these keys reads: all of them, where there are not many.

    Args:
        keys: [H, t, D], kept keys. bias: [H, t] float32, -inf in padding.
        scores: [H, t], their root-mean-square attention weight over all queries.
        queries: [H, N, D]. statistics: of these queries over all keys.
    """
    total = queries.shape[1]
    count = sample_size(total, keys.shape[1])
    if count == total:
        return ReferenceQueries(queries, statistics.lse, statistics.output)
    norms = scores.clamp(min=torch.finfo(torch.float32).tiny).log() + 0.5 * math.log(total)
    # The sum of squares is one of exponentials, too: of twice the scores.
    shares = attention_lse(
        keys, queries, scale=2 * scale, key_bias=2 * (bias - norms), chunk_bytes=chunk_bytes
    )
    leverage = torch.add(shares, statistics.lse, alpha=-2)
    order = leverage.argsort(dim=1, descending=True, stable=True)
    certain, drawn, rest = count // 2, count - count // 2, total - count // 2
    places = torch.cat([torch.arange(certain), certain + torch.arange(drawn) * rest // drawn])
    rows = order[:, to_device(places, order.device)]
    weights = torch.ones(count, dtype=statistics.lse.dtype)
    weights[:certain] = drawn / rest
    return ReferenceQueries(
        _rows(queries, rows),
        statistics.lse.gather(1, rows),
        _rows(statistics.output, rows),
        to_device(weights, order.device),
    )


def evenly_drawn(queries: Tensor, statistics: AttentionStatistics) -> ReferenceQueries:
    """Queries by which a head is judged whose keys are kept as they are."""
    total = queries.shape[1]
    count = sample_size(total, 0)
    if count == total:
        return ReferenceQueries(queries, statistics.lse, statistics.output)
    rows = to_device(torch.arange(count) * total // count, queries.device)
    return ReferenceQueries(queries[:, rows], statistics.lse[:, rows], statistics.output[:, rows])


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """[H, N, D], [H, n] -> [H, n, D]."""
    heads = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    return tensor[heads, rows]
