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
import triton.language as tl
from torch import Tensor

from vllm_am.compaction.pages import PagedKV
from vllm_am.compaction.statistics import SCORE_NORMS, AttentionStatistics
from vllm_am.kernels.device import multiprocessors
from vllm_am.kernels.tiles import (
    Tiling,
    check_storage,
    dot_precision,
    dot_rows,
    load_rows,
    log2_scores,
    row_pointers,
    score_constants,
    split_width,
    tiling_for,
    with_rows,
)

#: By compute capability and bytes of a number: (largest head size, tiling of the two passes).
#: Pass 1 keeps a block of queries and streams keys and values; pass 2 keeps keys, streams queries.
_TILINGS = {
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


@triton.jit
def _attend_tile(
    b_q,
    b_q_rest,
    b_max,
    b_sum,
    b_acc,
    b_acc_rest,
    keys,
    values,
    bias,
    page_ids,
    start,
    T,
    factor,
    cap,
    stride_kp,
    stride_kt,
    stride_vp,
    stride_vt,
    stride_bp,
    stride_bt,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    DV: tl.constexpr,
    DV_MAIN: tl.constexpr,
    DV_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax: the keys start ... start + BLOCK_T, of which T exist."""
    o_key = start + tl.arange(0, BLOCK_T)
    o_row = o_key
    if MASKED:
        o_row = tl.minimum(o_key, T - 1)  # a row that exists, instead of a mask on every load

    p_k = row_pointers(keys, page_ids, o_row, stride_kp, stride_kt, PAGED, PAGE_SIZE)
    b_k, b_k_rest = load_rows(p_k, D, D_MAIN, D_REST)
    b_dot = dot_rows(b_q, b_q_rest, b_k, b_k_rest, D_REST, PRECISION)
    b_s = log2_scores(b_dot, factor, cap, HAS_SOFTCAP)  # [BLOCK_N, BLOCK_T]
    if bias is not None:
        p_b = row_pointers(bias, page_ids, o_row, stride_bp, stride_bt, PAGED, PAGE_SIZE)
        b_s += (tl.load(p_b).to(tl.float32) * 1.4426950408889634)[None, :]
    if MASKED:
        b_s = tl.where((o_key < T)[None, :], b_s, float("-inf"))

    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf would be NaN
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_decay = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    if values is not None:
        p_v = row_pointers(values, page_ids, o_row, stride_vp, stride_vt, PAGED, PAGE_SIZE)
        b_v, b_v_rest = load_rows(p_v, DV, DV_MAIN, DV_REST)
        b_p = b_p.to(b_v.dtype)
        b_acc = tl.dot(b_p, b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
        if DV_REST > 0:
            b_acc_rest = tl.dot(
                b_p, b_v_rest, b_acc_rest * b_decay[:, None], input_precision=PRECISION
            )
    return b_new, b_sum, b_acc, b_acc_rest


@triton.jit(do_not_specialize=["N", "T", "query_blocks"])
def attention_forward_kernel(
    queries,
    keys,
    values,
    bias,
    page_ids,
    lengths,
    output,
    lse,
    N,
    T,
    query_blocks,
    factor,
    cap,
    stride_qh,
    stride_qn,
    stride_kp,
    stride_kt,
    stride_vp,
    stride_vt,
    stride_bp,
    stride_bt,
    stride_ph,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    DV: tl.constexpr,
    DV_MAIN: tl.constexpr,
    DV_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid [H * query_blocks]: output [H, N, DV] and lse [H, N] of BLOCK_N queries of a head.

    ``stride_kp``, ``stride_vp`` and ``stride_bp`` lead from page to page, or from head to head
    where there are no pages. Without ``values`` there is no output.
    """
    PAGED: tl.constexpr = page_ids is not None
    i_h = (tl.program_id(0) // query_blocks).to(tl.int64)
    i_n = tl.program_id(0) % query_blocks
    if PAGED:
        page_ids += i_h * stride_ph
        T = tl.load(lengths + i_h).to(tl.int32)
    else:
        keys += i_h * stride_kp
        if values is not None:
            values += i_h * stride_vp
        if bias is not None:
            bias += i_h * stride_bp

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_row = tl.minimum(o_n, N - 1).to(tl.int64)
    b_q, b_q_rest = load_rows(queries + i_h * stride_qh + o_row * stride_qn, D, D_MAIN, D_REST)

    b_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_acc = tl.zeros([BLOCK_N, DV_MAIN], tl.float32)
    b_acc_rest = tl.zeros([BLOCK_N, DV_REST if DV_REST > 0 else 1], tl.float32)

    full = T // BLOCK_T * BLOCK_T
    for start in range(0, full, BLOCK_T):
        b_max, b_sum, b_acc, b_acc_rest = _attend_tile(
            b_q, b_q_rest, b_max, b_sum, b_acc, b_acc_rest,
            keys, values, bias, page_ids, start, T, factor, cap,
            stride_kp, stride_kt, stride_vp, stride_vt, stride_bp, stride_bt,
            D, D_MAIN, D_REST, DV, DV_MAIN, DV_REST,
            BLOCK_T, PAGED, PAGE_SIZE, HAS_SOFTCAP, PRECISION, MASKED=False,
        )  # fmt: skip
    if full < T:
        b_max, b_sum, b_acc, b_acc_rest = _attend_tile(
            b_q, b_q_rest, b_max, b_sum, b_acc, b_acc_rest,
            keys, values, bias, page_ids, full, T, factor, cap,
            stride_kp, stride_kt, stride_vp, stride_vt, stride_bp, stride_bt,
            D, D_MAIN, D_REST, DV, DV_MAIN, DV_REST,
            BLOCK_T, PAGED, PAGE_SIZE, HAS_SOFTCAP, PRECISION, MASKED=True,
        )  # fmt: skip

    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_lse = (b_shift + tl.log2(b_sum)) * 0.6931471805599453
    tl.store(lse + i_h * N + o_n, b_lse, mask=m_n)
    if values is not None:
        b_inverse = (1.0 / tl.where(b_sum == 0, 1.0, b_sum))[:, None]  # no key seen: output 0
        p_o = output + (i_h * N + o_n)[:, None] * DV
        o_v = tl.arange(0, DV_MAIN)[None, :]
        tl.store(p_o + o_v, b_acc * b_inverse, mask=m_n[:, None] & (o_v < DV))
        if DV_REST > 0:
            o_v = DV_MAIN + tl.arange(0, DV_REST)[None, :]
            tl.store(p_o + o_v, b_acc_rest * b_inverse, mask=m_n[:, None] & (o_v < DV))


@triton.jit(do_not_specialize=["H", "N", "T", "key_blocks", "split_rows"])
def key_scores_kernel(
    queries,
    keys,
    bias,
    page_ids,
    lengths,
    lse,
    square_sums,
    maxima,
    sums,
    H,
    N,
    T,
    key_blocks,
    split_rows,
    factor,
    cap,
    stride_qh,
    stride_qn,
    stride_kp,
    stride_kt,
    stride_bp,
    stride_bt,
    stride_ph,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid [S * H * key_blocks]: sums of A_ij^2, maxima and sums of A_ij over ``split_rows``
    queries, for BLOCK_T keys of a head; each [S, H, T] (T of the longest head), or None.
    """
    PAGED: tl.constexpr = page_ids is not None
    i_block = tl.program_id(0) % key_blocks
    i_sh = (tl.program_id(0) // key_blocks).to(tl.int64)
    i_s, i_h = i_sh // H, i_sh % H
    if PAGED:
        page_ids += i_h * stride_ph
        length = tl.load(lengths + i_h).to(tl.int32)
    else:
        keys += i_h * stride_kp
        if bias is not None:
            bias += i_h * stride_bp
        length = T

    o_key = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    m_key = o_key < length
    if i_block * BLOCK_T < length:
        o_row = tl.minimum(o_key, length - 1)
        p_k = row_pointers(keys, page_ids, o_row, stride_kp, stride_kt, PAGED, PAGE_SIZE)
        b_k, b_k_rest = load_rows(p_k, D, D_MAIN, D_REST)
        if bias is not None:
            p_b = row_pointers(bias, page_ids, o_row, stride_bp, stride_bt, PAGED, PAGE_SIZE)
            b_bias = tl.load(p_b).to(tl.float32) * 1.4426950408889634

        b_square_sum = tl.zeros([BLOCK_T], tl.float32)
        b_maximum = tl.zeros([BLOCK_T], tl.float32)
        b_total = tl.zeros([BLOCK_T], tl.float32)
        begin = i_s.to(tl.int32) * split_rows
        for start in range(begin, tl.minimum(begin + split_rows, N), BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            o_query = tl.minimum(o_n, N - 1).to(tl.int64)
            p_q = queries + i_h * stride_qh + o_query * stride_qn
            b_q, b_q_rest = load_rows(p_q, D, D_MAIN, D_REST)
            b_lse = tl.load(lse + i_h * N + o_n, mask=o_n < N, other=float("inf"))
            # Queries that see no key (-inf), or do not exist, have the weight exp(s - inf) = 0.
            b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * 1.4426950408889634)

            b_dot = dot_rows(b_k, b_k_rest, b_q, b_q_rest, D_REST, PRECISION)
            b_s = log2_scores(b_dot, factor, cap, HAS_SOFTCAP)  # [BLOCK_T, BLOCK_N]
            if bias is not None:
                b_s += b_bias[:, None]
            b_a = tl.exp2(b_s - b_lse[None, :])
            if square_sums is not None:
                b_square_sum += tl.sum(b_a * b_a, 1)
            if maxima is not None:
                b_maximum = tl.maximum(b_maximum, tl.max(b_a, 1))
            if sums is not None:
                b_total += tl.sum(b_a, 1)

        o_out = i_sh * T + o_key
        if square_sums is not None:
            tl.store(square_sums + o_out, b_square_sum, mask=m_key)
        if maxima is not None:
            tl.store(maxima + o_out, b_maximum, mask=m_key)
        if sums is not None:
            tl.store(sums + o_out, b_total, mask=m_key)


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
    parts, value_parts = split_width(width), split_width(value_width)
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
    parts = split_width(width)
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
