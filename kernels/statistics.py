"""Attention statistics in two passes over the keys; reference: ``vllm_am.compaction.statistics``.

Pass 1 is flash attention without causality (Dao, arXiv 2307.08691): one program holds a block of
queries and runs over the keys with a running maximum. It leaves the output and the log-sum-exp of
every query. Pass 2 turns the roles round: one program holds a block of keys, runs over the queries,
recomputes the scores and reduces A_ij = exp(s_ij - lse_i) over the queries, which is stable because
no A_ij exceeds 1. Nothing of size [N, T] is written.

fp32 accumulation; like every flash attention, pass 1 rounds the weights to the values' dtype before
it multiplies the two. Lengths are not specialised on: one compilation per dtype and head size.
"""

# The parameters of kernels have no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vllm_am.compaction.pages import PagedKV
from vllm_am.compaction.statistics import SCORE_NORMS, AttentionStatistics
from vllm_am.kernels.device import multiprocessors
from vllm_am.kernels.statistics_kernels import attention_forward_kernel, key_scores_kernel
from vllm_am.kernels.tiles import (
    Tiling,
    check_storage,
    dot_precision,
    score_constants,
    split_width,
    tiling_for,
    with_rows,
)

#: By least compute capability and bytes of a number: (largest head size, tiling of the two passes).
#: Pass 1 keeps a block of queries and streams keys and values; pass 2 keeps keys, streams queries.
_TILINGS = {
    (100, 2): {64: (Tiling(128, 128, 8, 3), Tiling(128, 128, 8, 3)),
               128: (Tiling(128, 64, 8, 3), Tiling(128, 128, 8, 3)),
               256: (Tiling(128, 64, 8, 2), Tiling(64, 128, 8, 3))},
    (90, 2): {64: (Tiling(128, 128, 8, 3), Tiling(128, 128, 8, 3)),
              128: (Tiling(128, 128, 8, 2), Tiling(128, 128, 8, 3)),
              256: (Tiling(128, 64, 8, 2), Tiling(64, 128, 8, 3))},
    (90, 4): {64: (Tiling(64, 32, 4, 2), Tiling(64, 64, 4, 2)),
              128: (Tiling(64, 32, 8, 2), Tiling(32, 64, 4, 2)),
              256: (Tiling(32, 32, 8, 1), Tiling(32, 64, 8, 1))},
    (80, 2): {64: (Tiling(128, 64, 4, 3), Tiling(64, 128, 4, 3)),
              128: (Tiling(128, 64, 8, 2), Tiling(64, 128, 8, 2)),
              256: (Tiling(32, 32, 4, 2), Tiling(64, 64, 8, 2))},
    (80, 4): {64: (Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2)),
              128: (Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 1)),
              256: (Tiling(16, 32, 8, 1), Tiling(16, 16, 4, 1))},
}  # fmt: skip

#: Programs of pass 2 to aim at, so that the last wave of them is a small share of the whole.
_BLOCKS_PER_MULTIPROCESSOR = 4


@dataclass(frozen=True)
class _Cache:
    """Keys, values and bias as the kernels read them, dense or in pages.

    Attributes:
        keys: [H, T, D] or [pages, slots, D]; values: likewise, or None if no output is wanted.
        bias: [H, T] or [pages, slots], or None.
        page_ids: int [H, P], lengths: int [H]; both None where dense.
    """

    keys: Tensor
    values: Tensor | None
    bias: Tensor | None
    page_ids: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def columns(self) -> int:
        """T, or the slots of all pages of a head."""
        size = self.keys.shape[1]
        return size if self.page_ids is None else size * self.page_ids.shape[1]

    @property
    def page_size(self) -> int:
        """Slots of a page; of dense keys 1, which is not read."""
        return 1 if self.page_ids is None else self.keys.shape[1]


def _forward(
    cache: _Cache, queries: Tensor, factor: float, cap: float
) -> tuple[Tensor | None, Tensor]:
    """Pass 1: output [H, N, Dv] (None without values) and lse [H, N]."""
    heads, rows, width = queries.shape
    values = cache.values
    value_width = 0 if values is None else values.shape[-1]
    parts, value_parts = (split_width(size, queries.dtype) for size in (width, value_width))
    tiling, _ = tiling_for(_TILINGS, max(width, value_width), queries.dtype)
    query_blocks = triton.cdiv(rows, tiling.block_n)
    lse = queries.new_empty(heads, rows, dtype=torch.float32)
    output = None
    if values is not None:
        output = queries.new_empty(heads, rows, value_width, dtype=torch.float32)
    if heads * rows > 0:
        attention_forward_kernel[(heads * query_blocks,)](
            queries,
            cache.keys,
            values,
            cache.bias,
            cache.page_ids,
            cache.lengths,
            output,
            lse,
            rows,
            cache.columns,
            query_blocks,
            factor,
            cap,
            *queries.stride()[:2],
            *_strides(cache.keys),
            *_strides(values),
            *_strides(cache.bias),
            *_strides(cache.page_ids)[:1],
            D=width,
            D_MAIN=parts[0],
            D_REST=parts[1],
            DV=value_width,
            DV_MAIN=value_parts[0],
            DV_REST=value_parts[1],
            PAGE_SIZE=cache.page_size,
            HAS_SOFTCAP=cap > 0,
            PRECISION=dot_precision(queries.dtype),
            **tiling.options(),
        )
    return output, lse


def _scores(
    cache: _Cache, queries: Tensor, lse: Tensor, norms: Sequence[str], factor: float, cap: float
) -> dict[str, Tensor]:
    """Pass 2: each norm [H, T]."""
    heads, rows, width = queries.shape
    columns = cache.columns
    parts = split_width(width, queries.dtype)
    _, tiling = tiling_for(_TILINGS, width, queries.dtype)
    key_blocks = triton.cdiv(columns, tiling.block_t)
    # Few keys: the queries are split, so that every multiprocessor has a few blocks to work on.
    query_blocks = triton.cdiv(rows, tiling.block_n)
    wanted = triton.cdiv(_BLOCKS_PER_MULTIPROCESSOR * multiprocessors(), max(heads * key_blocks, 1))
    split_rows = max(triton.cdiv(query_blocks, wanted), 1) * tiling.block_n
    splits = triton.cdiv(rows, split_rows)

    def partial(norm: str) -> Tensor | None:
        return lse.new_zeros(splits, heads, columns) if norm in norms else None

    squares, maxima, sums = partial("rms"), partial("max"), partial("mean")
    if heads * rows * columns > 0 and norms:
        key_scores_kernel[(splits * heads * key_blocks,)](
            queries,
            cache.keys,
            cache.bias,
            cache.page_ids,
            cache.lengths,
            lse,
            squares,
            maxima,
            sums,
            heads,
            rows,
            columns,
            key_blocks,
            split_rows,
            factor,
            cap,
            *queries.stride()[:2],
            *_strides(cache.keys),
            *_strides(cache.bias),
            *_strides(cache.page_ids)[:1],
            D=width,
            D_MAIN=parts[0],
            D_REST=parts[1],
            PAGE_SIZE=cache.page_size,
            HAS_SOFTCAP=cap > 0,
            PRECISION=dot_precision(queries.dtype),
            **tiling.options(),
        )
    scores = {}
    if squares is not None:
        scores["rms"] = (squares.sum(0) / rows).sqrt()
    if maxima is not None:
        scores["max"] = maxima.amax(0) if splits else lse.new_zeros(heads, columns)
    if sums is not None:
        scores["mean"] = sums.sum(0) / rows
    return scores


def attention_lse(
    keys: Tensor,
    queries: Tensor,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The log-sum-exp of ``attention_statistics`` alone, fp32 [H, N]."""
    check_storage(queries, keys)
    bias = None if key_bias is None else key_bias.float()
    cache = _Cache(with_rows(keys), None, bias)
    return _forward(cache, with_rows(queries), *score_constants(scale, softcap))[1]


def attention_statistics(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    norms: Sequence[str] = ("rms",),
    softcap: float = 0.0,
) -> AttentionStatistics:
    """As ``vllm_am.compaction.statistics.attention_statistics``, from dense keys.

    Args:
        keys: [H, T, D]; values: [H, T, Dv]; queries: [H, N, D]; one dtype: bf16, fp16 or fp32.
        scale: of the scores, positive.
        key_bias: [H, T] or None. -inf hides a key; a head whose keys are all hidden has lse -inf,
            output 0 and scores 0.
        norms: which of ``SCORE_NORMS`` to compute.
        softcap: c > 0 replaces a score s by c tanh(s / c), before the bias is added; 0 does not.

    Raises:
        ValueError: an argument is of the wrong kind.
    """
    check_storage(queries, keys, values)
    _check_norms(norms)
    bias = None if key_bias is None else key_bias.float()
    cache = _Cache(with_rows(keys), with_rows(values), bias)
    return _statistics(cache, with_rows(queries), scale, norms, softcap)


def attention_statistics_paged(
    kv: PagedKV,
    page_ids: Tensor,
    lengths: Tensor,
    queries: Tensor,
    *,
    scale: float,
    norms: Sequence[str] = ("rms",),
    softcap: float = 0.0,
    use_bias: bool,
) -> AttentionStatistics:
    """``attention_statistics`` from the pages of a KV cache.

    Args:
        page_ids: int [H, P], a head's pages in order; entries behind its length are not read.
        lengths: int [H], slots that head h has; at most P * block_size.
        queries: [H, N, D] in the dtype of the pages.
        use_bias: add the bias of the slots (pages of compacted tokens); otherwise it is not read.

    Returns:
        scores are [H, P * block_size], 0 behind a head's length.
    """
    width = kv.pages.shape[2] // 2
    keys, values = kv.pages[..., :width], kv.pages[..., width:]
    check_storage(queries, keys, values)
    _check_norms(norms)
    bias = kv.bias if use_bias else None
    cache = _Cache(keys, values, bias, page_ids.contiguous(), lengths.contiguous())
    return _statistics(cache, with_rows(queries), scale, norms, softcap)


def _statistics(
    cache: _Cache, queries: Tensor, scale: float, norms: Sequence[str], softcap: float
) -> AttentionStatistics:
    factor, cap = score_constants(scale, softcap)
    output, lse = _forward(cache, queries, factor, cap)
    assert output is not None
    return AttentionStatistics(lse, output, _scores(cache, queries, lse, norms, factor, cap))


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _check_norms(norms: Sequence[str]) -> None:
    unknown = set(norms) - set(SCORE_NORMS)
    if unknown:
        raise ValueError(f"norms: unknown {sorted(unknown)}; known are {SCORE_NORMS}")
