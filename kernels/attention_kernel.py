# mypy: allow-untyped-defs, allow-incomplete-defs
"""The kernel of ``attention.py``, which says what it computes and launches it."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _row_of_block(query_start_loc, rows, i_block, TOKENS: tl.constexpr):
    """The last row r with query_start_loc[r] // TOKENS + r <= i_block.

    Blocks are handed out so that a row starts a new one, without counting the blocks before it:
    row r has those from query_start_loc[r] // TOKENS + r on, of which the last may be empty.
    """
    low = 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // TOKENS + middle <= i_block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend_slots(
    p_q,
    m_q,
    pages,
    bias,
    p_ids,
    begin,
    end,
    scale_log2,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Unnormalised attention of a query tile over slots [begin, end) of a list of pages.

    Returns:
        maximum score, base 2 [BLOCK_M]; sum of the weights exp2(s - maximum) [BLOCK_M]; weighted
        sum of the values [BLOCK_M, BLOCK_D]. Where all biases are -inf: -inf, 0 and 0.
    """
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Page ids are loaded a step ahead: they are the addresses of what the step loads. The first
    # ones before the queries, which have to arrive before anything else is issued.
    b_id = tl.load(p_ids + (begin + o_n) // N, mask=begin + o_n < end, other=0)
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    for i_n in range(begin, end, BLOCK_N):
        o_slot = i_n + o_n
        m_n = o_slot < end
        o_entry = b_id.to(tl.int64) * N + o_slot % N
        o_next = o_slot + BLOCK_N
        b_id = tl.load(p_ids + o_next // N, mask=o_next < end, other=0)

        p_k = pages + o_entry[:, None] * (2 * D) + o_d[None, :]
        m_kv = m_n[:, None] & m_d[None, :]
        b_bias = tl.load(bias + o_entry, mask=m_n, other=float("-inf"))
        b_k = tl.load(p_k, mask=m_kv, other=0.0)
        b_v = tl.load(p_k + D, mask=m_kv, other=0.0)

        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_s += (b_bias * LOG2E)[None, :]
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # -inf - -inf is NaN
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_scale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = b_acc * b_scale[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_max = b_new
    return b_max, b_sum, b_acc


@triton.jit
def _merge_live(b_max, b_sum, b_acc, p_output, p_lse, m_m, m_d):
    """Merge with the live part's output, in place; rows that saw no slot are left as they are."""
    m_seen = m_m & (b_max > float("-inf"))
    m_output = m_seen[:, None] & m_d[None, :]
    b_max = tl.where(m_seen, b_max, 0.0)
    b_lse = tl.load(p_lse, mask=m_seen, other=0.0) * LOG2E
    b_lse = tl.where(b_lse == float("inf"), float("-inf"), b_lse)
    b_shift = tl.maximum(b_max, b_lse)
    b_live = tl.exp2(b_lse - b_shift)
    b_scale = tl.exp2(b_max - b_shift)
    b_total = b_live + b_scale * b_sum
    # An output without a share may be anything, NaN included.
    m_live = m_output & (b_live > 0.0)[:, None]
    b_output = tl.load(p_output, mask=m_live, other=0.0).to(tl.float32)
    b_output = b_output * (b_live / b_total)[:, None] + b_acc * (b_scale / b_total)[:, None]
    tl.store(p_output, b_output.to(p_output.dtype.element_ty), mask=m_output)


@triton.jit(
    do_not_specialize=[
        "rows",
        "least_tokens",
        "most_tokens",
        "first_head",
        "partial_rows",
        "scale_log2",
        "stride_lse",
    ],
)
def attend_compacted_kernel(
    query,
    output,
    live_lse,
    pages,
    bias,
    query_start_loc,
    page_tables,
    active,
    capture_slots,
    query_pool,
    maxima,
    sums,
    outputs,
    arrivals,
    rows,
    least_tokens,
    most_tokens,
    first_head,
    partial_rows,
    scale_log2,
    stride_query_token,
    stride_query_head,
    stride_output_token,
    stride_output_head,
    stride_lse,
    stride_pool_slot,
    stride_pool_head,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    CAPTURE: tl.constexpr,
):
    """See the head of this file. Arguments are those of ``attend_compacted``, taken apart.

    Grid: (splits, H, rows) if SPLIT, else (blocks of query tokens, H, 1). Tile row m is query
    head m % G of KV head i_h at query token m // G. Rows of fewer tokens than ``least_tokens`` or
    more than ``most_tokens`` are another launch's.
    """
    if active is not None:  # noqa: SIM102  (known at compile time)
        if tl.load(active) == 0:
            return
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // G
    i_h = tl.program_id(1)
    if SPLIT:
        i_split = tl.program_id(0)
        i_row = tl.program_id(2)
        row_start = tl.load(query_start_loc + i_row)
        first_token = row_start
    else:
        i_split = 0
        i_row = _row_of_block(query_start_loc, rows, tl.program_id(0), BLOCK_TOKENS)
        row_start = tl.load(query_start_loc + i_row)
        i_block = tl.program_id(0) - (row_start // BLOCK_TOKENS + i_row)
        first_token = row_start + i_block * BLOCK_TOKENS
    end_token = tl.load(query_start_loc + i_row + 1)
    address = tl.load(page_tables + i_row)  # here: the three loads are under way at once
    tokens = end_token - row_start
    if (first_token >= end_token) | (tokens < least_tokens) | (tokens > most_tokens):
        return

    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_token = (first_token + o_m // G).to(tl.int64)
    o_head = i_h * G + o_m % G
    m_m = (o_m < BLOCK_TOKENS * G) & (o_token < end_token)
    m_d = o_d < D
    p_query = query + o_token * stride_query_token + o_head * stride_query_head

    if CAPTURE:  # noqa: SIM102  (known at compile time: there is no pool otherwise)
        if i_split == 0:
            b_slot = tl.load(capture_slots + o_token, mask=m_m, other=-1)
            m_captured = (b_slot >= 0)[:, None] & m_d[None, :]
            b_captured = tl.load(p_query[:, None] + o_d[None, :], mask=m_captured)
            p_pool = query_pool + b_slot * stride_pool_slot + o_head * stride_pool_head
            tl.store(p_pool[:, None] + o_d[None, :], b_captured, mask=m_captured)

    if address == 0:
        return
    p_table = address.to(tl.pointer_type(tl.int32))
    first_id = tl.load(p_table + first_head + i_h)
    slots = (tl.load(p_table + first_head + i_h + 1) - first_id) * N
    if SPLIT:
        tiles = tl.cdiv(slots, BLOCK_N)
        tiles_per_split = tl.maximum(tl.cdiv(tiles, tl.num_programs(0)), MIN_TILES)
        splits = tl.cdiv(tiles, tiles_per_split)
        begin = i_split * tiles_per_split * BLOCK_N
        end = tl.minimum(slots, begin + tiles_per_split * BLOCK_N)
    else:
        begin = 0
        end = slots
    if begin >= end:
        return

    m_q = m_m[:, None] & m_d[None, :]
    b_max, b_sum, b_acc = _attend_slots(
        p_query[:, None] + o_d[None, :],
        m_q,
        pages,
        bias,
        p_table + first_id,
        begin,
        end,
        scale_log2,
        D,
        N,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    p_output = output + o_token * stride_output_token + o_head * stride_output_head
    p_output = p_output[:, None] + o_d[None, :]
    p_lse = live_lse + o_head.to(tl.int64) * stride_lse + o_token
    if SPLIT:
        if splits == 1:
            _merge_live(b_max, b_sum, b_acc, p_output, p_lse, m_m, m_d)
        else:
            i_head = i_row * H + i_h
            o_first = (i_head * tl.num_programs(0)).to(tl.int64) * partial_rows + o_m
            o_part = o_first + i_split * partial_rows
            tl.store(maxima + o_part, b_max, mask=m_m)
            tl.store(sums + o_part, b_sum, mask=m_m)
            tl.store(outputs + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_q)
            # One thread counts the program in. The barrier puts the other threads' stores before
            # its release; Triton has all threads wait for what it returns, so that its acquire
            # comes before their loads.
            tl.debug_barrier()
            if tl.atomic_add(arrivals + i_head, 1, sem="acq_rel", scope="gpu") == splits - 1:
                b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
                b_sum = tl.zeros([BLOCK_M], tl.float32)
                b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                # Unrolled: the loads of several splits are under way at once.
                for i_part in tl.range(0, splits, loop_unroll_factor=4):
                    o_part = o_first + i_part * partial_rows
                    b_part_max = tl.load(
                        maxima + o_part, mask=m_m, other=float("-inf"), cache_modifier=".cg"
                    )
                    b_part_sum = tl.load(sums + o_part, mask=m_m, other=0.0, cache_modifier=".cg")
                    b_part = tl.load(
                        outputs + o_part[:, None] * D + o_d[None, :],
                        mask=m_q,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    b_new = tl.maximum(b_max, b_part_max)
                    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
                    b_scale = tl.exp2(b_max - b_shift)
                    b_part_scale = tl.exp2(b_part_max - b_shift)
                    b_sum = b_sum * b_scale + b_part_sum * b_part_scale
                    b_acc = b_acc * b_scale[:, None] + b_part * b_part_scale[:, None]
                    b_max = b_new
                _merge_live(b_max, b_sum, b_acc, p_output, p_lse, m_m, m_d)
                tl.store(arrivals + i_head, 0)  # for the next launch
    else:
        _merge_live(b_max, b_sum, b_acc, p_output, p_lse, m_m, m_d)
