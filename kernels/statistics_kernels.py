"""The two passes of ``statistics.py``, which says what they compute and launches them."""

# The parameters of kernels have no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from vllm_am.kernels.tiles import dot_rows, load_rows, log2_scores, row_pointers


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


# Nor on a stride that is a number of keys: it would be compiled again where 16 divides that.
@triton.jit(do_not_specialize=["N", "T", "query_blocks", "stride_bp"])
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


@triton.jit(do_not_specialize=["H", "N", "T", "key_blocks", "split_rows", "stride_bp"])
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
