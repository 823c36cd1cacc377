# mypy: allow-untyped-defs, allow-incomplete-defs
"""Write a compacted sequence into its pages: all heads in one launch.

Beside its plain-torch reference, ``vllm_am/compaction/pages.py`` (write_pages).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_am.compaction.pages import PagedKV


@triton.jit(do_not_specialize=["stride_indices_h", "stride_bias_h", "H"])
def write_pages_kernel(
    pages,
    page_bias,
    table,
    keys,
    indices,
    values,
    bias,
    lengths,
    stride_keys_h,
    stride_keys_t,
    stride_values_h,
    stride_values_t,
    stride_indices_h,
    stride_bias_h,
    H,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_INDICES: tl.constexpr,
):
    """One page: slots [SIZE] of one head, keys and values [SIZE, 2 * D].

    The head of entry e of the table is the last one whose first entry, table[h], is at most e: the
    starts table[0..H] ascend, so it is the number of those that are, less one.
    """
    i_entry = H + 1 + tl.program_id(0)
    o_h = tl.arange(0, BLOCK_H)
    b_starts = tl.load(table + o_h, mask=o_h < H, other=2147483647)
    i_h = (tl.sum((b_starts <= i_entry).to(tl.int32), axis=0) - 1).to(tl.int64)
    i_page = tl.load(table + i_entry).to(tl.int64)
    first_slot = (i_entry - tl.load(table + i_h)) * SIZE

    o_n = tl.arange(0, BLOCK_SIZE)
    o_d = tl.arange(0, BLOCK_D)
    o_slot = (first_slot + o_n).to(tl.int64)
    m_n = o_n < SIZE
    m_slot = m_n & (o_slot < tl.load(lengths + i_h))
    o_row = o_slot
    if HAS_INDICES:
        o_row = tl.load(indices + i_h * stride_indices_h + o_slot, mask=m_slot, other=0)
        o_row = o_row.to(tl.int64)
    m_d = o_d < D
    m_read = m_slot[:, None] & m_d[None, :]
    p_keys = keys + i_h * stride_keys_h + o_row[:, None] * stride_keys_t + o_d[None, :]
    p_values = values + i_h * stride_values_h + o_slot[:, None] * stride_values_t + o_d[None, :]
    b_keys = tl.load(p_keys, mask=m_read, other=0.0)
    b_values = tl.load(p_values, mask=m_read, other=0.0)
    b_bias = tl.load(bias + i_h * stride_bias_h + o_slot, mask=m_slot, other=float("-inf"))

    # An unused slot is zero in full: NaN left in it would reach the output as 0 * NaN.
    m_write = m_n[:, None] & m_d[None, :]
    p_pages = pages + i_page * (SIZE * 2 * D) + o_n[:, None] * (2 * D) + o_d[None, :]
    tl.store(p_pages, b_keys.to(pages.dtype.element_ty), mask=m_write)
    tl.store(p_pages + D, b_values.to(pages.dtype.element_ty), mask=m_write)
    tl.store(page_bias + i_page * SIZE + o_n, b_bias, mask=m_n)


def write_pages(
    kv: PagedKV,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    lengths: Tensor,
    *,
    indices: Tensor | None = None,
) -> None:
    """Write each head's slots into its pages, rounded to the cache's dtype; no host sync.

    Slots from ``lengths[h]`` to the end of a head's last page get keys and values 0 and bias -inf.
    Other pages are not touched.

    Args:
        kv: ``kv.pages`` and ``kv.bias``, both contiguous, are written in place.
        table: int32, of one sequence (``pages.page_table``), on the device. A head's pages must
            have room for its slots; slots beyond are dropped.
        keys: [H, t, D], or with ``indices`` [H, T, D]: any T rows to choose from.
        values: [H, t, D]. bias: float32 [H, t].
        lengths: int [H], on the device.
        indices: int [H, t], rows of ``keys`` to keep; only the first ``lengths[h]`` are read.

        Keys and values are of any floating-point dtype; their last dimension and that of bias and
        indices must be contiguous.

    Raises:
        ValueError: shapes that do not fit together, or strides as above.
    """
    heads, _, head_dim = values.shape
    page_size, width = kv.pages.shape[1:]
    if width != 2 * head_dim or keys.shape[2] != head_dim or keys.shape[0] != heads:
        raise ValueError(
            f"pages of {tuple(kv.pages.shape)} do not take keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)}"
        )
    rows = (values.shape[0], values.shape[1])
    chosen = keys[..., 0] if indices is None else indices
    for name, tensor in (("bias", bias), ("keys" if indices is None else "indices", chosen)):
        if tuple(tensor.shape) != rows:
            raise ValueError(f"{name}: {tuple(tensor.shape)} instead of {rows} heads and slots")
    inputs = {"keys": keys, "values": values, "bias": bias, "indices": indices}
    for name, given in inputs.items():
        if given is not None and given.stride(-1) != 1 and given.shape[-1] > 1:
            raise ValueError(f"{name}: the last dimension is not contiguous")
    if not kv.pages.is_contiguous() or not kv.bias.is_contiguous():
        raise ValueError("kv: pages and bias must be contiguous")
    count = table.numel() - heads - 1
    if count <= 0:
        return
    write_pages_kernel[(count,)](
        kv.pages,
        kv.bias,
        table,
        keys,
        indices if indices is not None else lengths,
        values,
        bias,
        lengths,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        indices.stride(0) if indices is not None else 0,
        bias.stride(0),
        heads,
        SIZE=page_size,
        D=head_dim,
        # Of all layers, not of those that are written now: the same kernel for slices of any size.
        BLOCK_H=triton.next_power_of_2(max(heads, kv.num_heads)),
        BLOCK_SIZE=triton.next_power_of_2(page_size),
        BLOCK_D=triton.next_power_of_2(head_dim),
        HAS_INDICES=indices is not None,
    )
