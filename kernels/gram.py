"""Normal equations of the two fits; reference: ``fit_bias`` and ``fit_values`` in
``vllm_am.compaction``.

Both fits are least squares over the reference queries on a matrix of one form,

    A_ij = u_i exp(s_ij - l_i):

with u the root of the row weight, for the mass, l is the log-sum-exp over the original keys, for
the output, that over the kept keys. A kernel writes A, split in two halves
of fp16, and cuBLAS multiplies: recomputing the exponentials in every tile of A'A would cost t / 128
times as many, and a matrix product of one's own would at best save the half of A'A that is the
mirror image of the other. The rows are multiplied in bands; of small heads several are one batch,
for the host takes longer to launch a product of them than the device to compute it.

Precision. A = hi + lo with hi = fp16(A), lo = fp16(A - hi), both scaled by 2^14, which A <= 3.99
allows and (kept keys are among the original ones; u <= 100^(1/4)) fulfils. That leaves a relative
error of 2^-22 for entries above 1e-5 and an absolute one of 2e-12 below. Of the four products
lo'lo (2^-22 of the whole) is left out and hi'lo serves for its mirror image too, so A'A costs two
products at the speed of fp16; products of fp16 are exact in fp32, and the products of bands are
added up in fp32. On a CPU the error against fp64, in units of sqrt(G_jj G_kk), is below 4e-6
(``tests/kernels/test_gram.py``); it comes from the fp32 scores as well. Tensor cores cut off where
a CPU rounds: on an H200 the diagonal comes out too small by 1.3e-6 of itself in bands of 256 rows,
2.6e-6 of 512, 5.2e-6 of 1,024, 1.1e-5 of 2,048 and 4.4e-5 of 8,192, and so do its neighbours.
"""

# The parameters of kernels have no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_am.compaction.fit_values import output_row_weights
from vllm_am.kernels.statistics import attention_lse
from vllm_am.kernels.tiles import (
    Tiling,
    check_storage,
    dot_precision,
    dot_rows,
    load_rows,
    log2_scores,
    score_constants,
    split_width,
    tiling_for,
    with_rows,
)

#: What A and the targets are multiplied by, to use the range of fp16: up to 65504.
_UNIT = 2.0**14

#: Rows of A per product, at most: few enough for the sums of tensor cores.
_BAND_ROWS = 1024

#: Bound of the workspace: two fp16 copies of bands and their products, as many at once as fit.
_WORKSPACE_BYTES = 224 << 20

_TILINGS = {
    (90, 2): {256: (Tiling(128, 64, 8, 1),)},
    (90, 4): {256: (Tiling(64, 64, 8, 1),)},
    (80, 2): {256: (Tiling(64, 64, 8, 1),)},
    (80, 4): {256: (Tiling(32, 32, 4, 1),)},
}


@triton.jit(
    do_not_specialize=[
        "first",
        "rows",
        "height",
        "t",
        "row_blocks",
        "key_blocks",
        "stride_bh",
        "stride_lh",
    ]
)
def design_matrix_kernel(
    queries,
    keys,
    bias,
    lse,
    row_factors,
    high,
    low,
    first,
    rows,
    height,
    t,
    columns,
    row_blocks,
    key_blocks,
    factor,
    cap,
    unit,
    stride_qh,
    stride_qn,
    stride_kh,
    stride_kt,
    stride_bh,
    stride_lh,
    stride_zh,
    stride_zn,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid [H * row_blocks * key_blocks]: high and low [H, height, columns], a tile per program.

    unit * A = high + low for the queries first ... first + rows; A_ij = u_i exp(s_ij + b_j - l_i)
    with u the ``row_factors`` (None is 1). A query whose l_i is -inf, for it sees no key, gets 0,
    and so do the rows behind ``rows`` and the columns behind t: ``columns`` is a multiple of 16,
    which Triton sees and stores 16 bytes at a time, as it would not with t for a mask.
    """
    i_t = tl.program_id(0) % key_blocks
    i_n = tl.program_id(0) // key_blocks % row_blocks
    i_h = (tl.program_id(0) // key_blocks // row_blocks).to(tl.int64)

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows that exist, instead of masks on every load.
    o_query = (first + tl.minimum(o_n, rows - 1)).to(tl.int64)
    o_key = tl.minimum(o_t, t - 1).to(tl.int64)

    p_q = queries + i_h * stride_qh + o_query * stride_qn
    p_k = keys + i_h * stride_kh + o_key * stride_kt
    b_q, b_q_rest = load_rows(p_q, D, D_MAIN, D_REST)
    b_k, b_k_rest = load_rows(p_k, D, D_MAIN, D_REST)
    b_dot = dot_rows(b_q, b_q_rest, b_k, b_k_rest, D_REST, PRECISION)
    b_s = log2_scores(b_dot, factor, cap, HAS_SOFTCAP)  # [BLOCK_N, BLOCK_T]
    b_bias = tl.load(bias + i_h * stride_bh + o_key)
    b_lse = tl.load(lse + i_h * stride_lh + o_query)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    b_s += b_bias[None, :] * 1.4426950408889634 - b_lse[:, None] * 1.4426950408889634
    b_a = tl.exp2(b_s) * unit
    if row_factors is not None:
        b_a *= tl.load(row_factors + i_h * stride_lh + o_query)[:, None]

    b_a = tl.where((o_n < rows)[:, None] & (o_t < t)[None, :], b_a, 0.0)

    b_high = b_a.to(tl.float16)
    b_low = (b_a - b_high.to(tl.float32)).to(tl.float16)
    o_z = i_h * stride_zh + o_n.to(tl.int64)[:, None] * stride_zn + o_t[None, :]
    m_z = (o_n < height)[:, None] & (o_t < columns)[None, :]
    tl.store(high + o_z, b_high, mask=m_z)
    tl.store(low + o_z, b_low, mask=m_z)


@dataclass(frozen=True)
class _Design:
    """What the matrix A [H, n, t] of a fit is made of; it is only ever written in parts.

    Attributes:
        keys: [H, t, D]; queries: [H, n, D]; both with rows of stride 1.
        bias: fp32 [H, t]; lse: fp32 [H, n].
        row_factors: u, fp32 [H, n], or None for 1.
        factor, cap: of ``log2_scores``.
    """

    keys: Tensor
    bias: Tensor
    queries: Tensor
    lse: Tensor
    row_factors: Tensor | None
    factor: float
    cap: float

    def write(self, heads: slice, first: int, halves: Tensor) -> None:
        """The rows first ... of some heads, in two halves [h, height, 2, columns], zeros behind n
        and t.
        """
        high, low = halves.unbind(2)
        keys, bias, queries, lse = (
            x[heads] for x in (self.keys, self.bias, self.queries, self.lse)
        )
        count, height, columns = high.shape
        _, size, width = keys.shape
        rows = min(queries.shape[1] - first, height)
        parts = split_width(width, keys.dtype)
        (tiling,) = tiling_for(_TILINGS, width, keys.dtype)
        row_blocks, key_blocks = (
            triton.cdiv(height, tiling.block_n),
            triton.cdiv(columns, tiling.block_t),
        )
        design_matrix_kernel[(count * row_blocks * key_blocks,)](
            queries,
            keys,
            bias,
            lse,
            None if self.row_factors is None else self.row_factors[heads],
            high,
            low,
            first,
            rows,
            height,
            size,
            columns,
            row_blocks,
            key_blocks,
            self.factor,
            self.cap,
            _UNIT,
            *queries.stride()[:2],
            *keys.stride()[:2],
            bias.stride(0),
            lse.stride(0),
            *high.stride()[:2],
            D=width,
            D_MAIN=parts[0],
            D_REST=parts[1],
            HAS_SOFTCAP=self.cap > 0,
            PRECISION=dot_precision(keys.dtype),
            **tiling.options(),
        )


def mass_normal_equations(
    keys: Tensor,
    bias: Tensor,
    queries: Tensor,
    lse: Tensor,
    *,
    scale: float,
    row_weights: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """A'RA / r and A'R1 / r with A_ij = exp(s_ij - lse_i), as ``fit_bias`` has them.

    Args:
        keys: [H, t, D], kept keys; queries: [H, n, D]; one dtype: bf16, fp16 or fp32.
        bias: [H, t], -inf in padding. lse: [H, n], over a set of keys that includes these.
        row_weights: [n], at most 1, or None for 1.
        scale, softcap: as in ``attention_statistics``.

    Returns:
        gram [H, t, t] and rhs [H, t], fp64. Queries that see no key count as rows of zeros.
    """
    check_storage(queries, keys)
    rows = queries.shape[1]
    lse = lse.float().contiguous()
    constants = score_constants(scale, softcap)
    roots, targets, factor = None, None, 1 / max(rows, 1)
    if row_weights is not None:
        roots = row_weights.float().sqrt().expand(len(keys), rows).contiguous()
        targets = (torch.ones_like(roots).unsqueeze(2), roots.unsqueeze(2))
        factor = 1 / row_weights.double().sum()
    design = _Design(with_rows(keys), _floats(bias), with_rows(queries), lse, roots, *constants)
    gram, rhs = _normal_equations(design, targets, factor)
    return gram, rhs.squeeze(2)


def output_normal_equations(
    keys: Tensor,
    bias: Tensor,
    queries: Tensor,
    output: Tensor,
    *,
    scale: float,
    row_weights: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """X'WX and X'WY with X the softmax over the kept keys, as ``fit_values`` has them.

    Args:
        keys, bias, queries, scale, row_weights, softcap: as in ``mass_normal_equations``.
        output: [H, n, Dv] fp32, the original outputs Y, which also determine the row weights W.

    Returns:
        gram [H, t, t] and rhs [H, t, Dv], fp64.
    """
    lse = attention_lse(keys, queries, scale=scale, key_bias=bias, softcap=softcap)
    root = output_row_weights(output, row_weights)  # [H, n, 1]
    constants = score_constants(scale, softcap)
    design = _Design(
        with_rows(keys),
        _floats(bias),
        with_rows(queries),
        lse,
        _floats(root.squeeze(2)),
        *constants,
    )
    return _normal_equations(design, (output.float(), root.float()), 1.0)


def _normal_equations(
    design: _Design, targets: tuple[Tensor, Tensor] | None, factor: float | Tensor
) -> tuple[Tensor, Tensor]:
    """A'A [H, t, t] and A'Y [H, t, r] times ``factor``, in fp64.

    Args:
        targets: Y is the product of these two, fp32 [H, n, r] and [H, n, 1]; (1, ..., 1) if None.
    """
    keys, queries = design.keys, design.queries
    heads, size, _ = keys.shape
    rows = queries.shape[1]
    columns = 1 if targets is None else targets[0].shape[2]
    gram = keys.new_zeros(heads, size, size, dtype=torch.float64)
    rhs = keys.new_zeros(heads, size, columns, dtype=torch.float64)
    if gram.numel() == 0 or rows == 0:
        return gram, rhs

    bands = triton.cdiv(rows, _BAND_ROWS)
    height = _multiple_of_16(triton.cdiv(rows, bands))
    peak = None
    if targets is None:
        y = keys.new_zeros(heads, bands * height, 32, dtype=torch.float16)
        y[:, :rows, 0] = _UNIT
    else:
        y, peak = _halves(*targets, bands * height)
    # Columns behind t, which are zeros: cuBLAS takes five times as long where a dimension is no
    # multiple of 8.
    padded = _multiple_of_16(size)
    sums_bytes = 4 * padded * 2 * (padded + y.shape[2])  # of a head
    group = max(1, min(heads, _WORKSPACE_BYTES // (sums_bytes + 4 * padded * height)))
    # Bands of each head that are one batch: a batch of several has a product for each.
    room = _WORKSPACE_BYTES // group - sums_bytes
    stretch = max(1, min(bands, room // (sums_bytes + 4 * padded * height)))
    for start in range(0, heads, group):
        part = slice(start, min(start + group, heads))
        count = part.stop - start
        # hi'[hi, lo] and [hi, lo]'y
        square = keys.new_zeros(count, padded, 2 * padded, dtype=torch.float32)
        against = keys.new_zeros(count, 2 * padded, y.shape[2], dtype=torch.float32)
        for band in range(0, bands, stretch):
            first, last = band * height, min(band + stretch, bands) * height
            halves = y.new_empty(count, last - first, 2, padded)
            design.write(part, first, halves)
            both = halves.view(-1, height, 2 * padded)
            _add_product(square, both[..., :padded].mT, both)
            _add_product(against, both.mT, y[part, first:last].reshape(len(both), height, -1))
        main, cross = square.unflatten(2, (2, padded)).unbind(2)
        gram[part] = main.add_(cross).add_(cross.mT)[:, :size, :size]
        upper, lower = against.unflatten(1, (2, padded)).unbind(1)
        half = y.shape[2] // 2
        upper[..., :half].add_(upper[..., half:]).add_(lower[..., :half])
        rhs[part] = upper[:, :size, :columns]
    factor = factor / _UNIT**2
    return gram.mul_(factor), rhs.mul_(factor if peak is None else peak.double() * factor)


def _halves(targets: Tensor, root: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """The targets Y as A is: two halves of fp16 side by side [H, height, 2 r'], r' a multiple of
    16, zeros behind their rows, and what they were scaled by, fp32 [H, 1, 1].

    Head by head: a large target spoils no other head.
    """
    heads, rows, columns = targets.shape
    norm = torch.linalg.vector_norm(targets, ord=torch.inf, dim=2, keepdim=True)
    peak = (norm * root).amax(dim=1, keepdim=True)
    peak = torch.where(peak == 0, 1.0, peak)
    scaled = targets * (root * (_UNIT / peak))
    half = _multiple_of_16(columns)
    y = targets.new_zeros(heads, height, 2 * half, dtype=torch.float16)
    y[:, :rows, :columns] = scaled
    y[:, :rows, half : half + columns] = scaled.sub_(y[:, :rows, :columns])
    return y, peak


def _multiple_of_16(number: int) -> int:
    return (number + 15) // 16 * 16


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [h, m, n] += a @ b in fp32, of fp16 [h * bands, m, k] and [h * bands, k, n]."""
    single = len(a) == len(total)
    if a.device.type == "cpu":  # torch has no out_dtype there
        product = torch.bmm(a.float(), b.float())
    elif single:
        torch.baddbmm(total, a, b, out_dtype=torch.float32, out=total)
        return
    else:
        product = torch.bmm(a, b, out_dtype=torch.float32)
    total.add_(product if single else product.unflatten(0, (len(total), -1)).sum(dim=1))


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
