"""What the attention kernels share: tiles of rows, dense or paged, and the scores between them.

A row of D numbers is loaded in one or two parts whose sizes are powers of two, as Triton wants
them: 80 = 64 + 16 and 96 = 64 + 32 would otherwise cost as much as 128.
"""

# The parameters of kernels have no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_am.kernels.device import compute_capability

LOG2_E = math.log2(math.e)

#: Least inner size of ``tl.dot``, by bytes of a number: on an H200, Triton 3.6's product of fp32 by
#: three of tf32 is wrong at 16 (and reads beyond what is its own); at 32 it is right.
_MIN_PART = {2: 16, 4: 32}

#: What the kernels can read.
STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Largest head size: beyond it a tile of keys and one of queries no longer fit shared memory.
MAX_WIDTH = 256


@dataclass(frozen=True)
class Tiling:
    """How a kernel of queries [N] by keys [T] is cut, and run by a multiprocessor."""

    block_n: int
    block_t: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """As keyword arguments of a kernel's launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_T": self.block_t,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def tiling_for(
    table: Mapping[tuple[int, int], Mapping[int, tuple[Tiling, ...]]],
    width: int,
    dtype: torch.dtype,
) -> tuple[Tiling, ...]:
    """The entry for the current device, the least that is not narrower than ``width``.

    Args:
        table: by the least compute capability and bytes of a number, then by head size.
    """
    capability = compute_capability()
    if capability == 0:  # the interpreter: small tiles, so that small problems have several
        return tuple(Tiling(16, 32, 4, 1) for _ in next(iter(table[90, 2].values())))
    size = dtype.itemsize
    by_width = table[max(least for least, s in table if least <= capability and s == size), size]
    return by_width[min(size for size in by_width if size >= width)]


def check_storage(*tensors: Tensor) -> None:
    """Refuse queries, keys and values that the kernels cannot read.

    Raises:
        ValueError: their dtypes differ or are not supported, or they are too wide.
    """
    dtypes = [tensor.dtype for tensor in tensors]
    if dtypes[0] not in STORAGE_DTYPES or len(set(dtypes)) > 1:
        names = ", ".join(map(str, STORAGE_DTYPES))
        raise ValueError(
            f"queries, keys and values must share one dtype of {names}; "
            f"got {', '.join(map(str, dtypes))}"
        )
    widest = max(tensor.shape[-1] for tensor in tensors)
    if widest > MAX_WIDTH:
        raise ValueError(f"head size {widest}: at most {MAX_WIDTH} is supported")


def with_rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dimension, which must be 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def split_width(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Two powers of two that cover ``width``; the second is 0 where it would save nothing."""
    least = _MIN_PART[dtype.itemsize]
    whole = max(least, triton.next_power_of_2(width))
    main = whole // 2
    rest = max(least, triton.next_power_of_2(width - main)) if width > main else 0
    return (main, rest) if main >= least and main + rest < whole else (whole, 0)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: fp32 is split into three products on tensor cores, which
    keeps 21 of its 24 bits or more; 16-bit inputs are exact in any case."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def score_constants(scale: float, softcap: float) -> tuple[float, float]:
    """The ``factor`` and ``cap`` of ``log2_scores``: exp2 is what the hardware has.

    Raises:
        ValueError: a negative or non-finite argument.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: must be positive and finite, got {scale}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: must not be negative (0 is none), got {softcap}")
    if softcap == 0:
        return scale * LOG2_E, 0.0
    return 2 * scale / softcap * LOG2_E, softcap * LOG2_E


@triton.jit
def log2_scores(b_dot, factor, cap, HAS_SOFTCAP: tl.constexpr):
    """log2(e) * scale * q.k, or log2(e) * softcap * tanh(scale * q.k / softcap)."""
    b_s = b_dot * factor
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both ends, where exp is 0 or inf.
        b_s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(b_s)))
    return b_s


@triton.jit
def row_pointers(
    base, page_ids, o_row, stride_page, stride_row, PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr
):
    """Where the rows ``o_row`` of a head begin: at ``base``, or in the pages of the list."""
    if PAGED:
        b_page = tl.load(page_ids + o_row // PAGE_SIZE).to(tl.int64)
        p_row = base + b_page * stride_page + (o_row % PAGE_SIZE) * stride_row
    else:
        p_row = base + o_row.to(tl.int64) * stride_row
    return p_row


@triton.jit
def load_part(p_row, FROM: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FROM ... FROM + SIZE of rows that are WIDTH wide; zeros beyond."""
    o_column = FROM + tl.arange(0, SIZE)
    p_part = p_row[:, None] + o_column[None, :]
    if FROM + SIZE > WIDTH:
        b_part = tl.load(p_part, mask=(o_column < WIDTH)[None, :], other=0.0)
    else:
        b_part = tl.load(p_part)
    return b_part


@triton.jit
def load_rows(p_row, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Whole rows in their parts (see ``split_width``); the first twice if there is no second."""
    b_main = load_part(p_row, 0, MAIN, WIDTH)
    b_rest = b_main
    if REST > 0:
        b_rest = load_part(p_row, MAIN, REST, WIDTH)
    return b_main, b_rest


@triton.jit
def dot_rows(b_a, b_a_rest, b_b, b_b_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """[M, N] inner products of M rows with N rows, fp32."""
    b_dot = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)
    if REST > 0:
        b_dot = tl.dot(b_a_rest, tl.trans(b_b_rest), b_dot, input_precision=PRECISION)
    return b_dot
