"""Attention over pages on the CPU: csrc/attend_pages.cpp, compiled by the machine's own compiler.

Its plain-torch reference is ``vllm_am/compaction/attend_pages.py``, which also does the work where
there is no compiler (vLLM's CPU build needs one for torch.compile), for other dtypes than float32
and bfloat16, and for prefill chunks, which are matrix products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_am.compaction.attend_pages import PagedRow
from vllm_am.compaction.pages import PagedKV
from vllm_am.kernels.cpu_library import library

#: Entry points of the library, by the dtype of the pages.
FUNCTIONS = {torch.float32: "attend_pages_float32", torch.bfloat16: "attend_pages_bfloat16"}

#: Rows with more new tokens than this are attended to faster as matrix products.
MOST_NEW = 8


class _Batch(ctypes.Structure):
    """``Batch`` of csrc/attend_pages.cpp."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("page_size", ctypes.c_int64),
        ("pages_per_block", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        ("fresh", ctypes.c_void_p),
        ("live_tokens", ctypes.c_void_p),
        ("blocks_from", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("compacted", ctypes.c_void_p),
        ("width", ctypes.c_void_p),
    )


class PageAttention:
    """The rows of a batch with few new tokens, and what they attend to; the same in all layers."""

    def __init__(self, rows: Sequence[PagedRow], kv: PagedKV, query_heads: int) -> None:
        self.kv = kv
        lists = [None if row.compacted is None else row.compacted.contiguous() for row in rows]
        counts = torch.tensor([0, *(len(row.blocks) for row in rows)])
        # Whatever the C++ code reads has to outlive the calls.
        self._held = [
            torch.tensor([row.first for row in rows]),
            torch.tensor([row.new for row in rows]),
            torch.tensor([row.live_tokens for row in rows]),
            counts.cumsum(0),
            torch.cat([row.blocks for row in rows]),
            torch.tensor([0 if pages is None else pages.data_ptr() for pages in lists]),
            torch.tensor([0 if pages is None else pages.shape[1] for pages in lists]),
        ]
        self._lists = lists
        self._batch = _Batch(
            kv.pages.data_ptr(),
            kv.bias.data_ptr(),
            kv.page_size,
            kv.pages_per_block,
            kv.pages.shape[2] // 2,
            kv.num_kv_heads,
            query_heads // kv.num_kv_heads,
            kv.block_stride,
            len(rows),
            *(tensor.data_ptr() for tensor in self._held),
        )

    @staticmethod
    def takes(row: PagedRow, kv: PagedKV) -> bool:
        """Whether a row is for the kernel, and the kernel is there."""
        return row.new <= MOST_NEW and kv.pages.dtype in FUNCTIONS and library() is not None

    def __call__(
        self,
        queries: Tensor,
        out: Tensor,
        layer: int,
        *,
        scale: float,
        sinks: Tensor | None = None,
    ) -> None:
        """Attention of all its rows.

        Args:
            queries: [tokens, query heads, D] of the whole batch, in the dtype of the pages.
            out: like ``queries``, written at the rows.
            layer: index of the layer.
            scale: factor on the scores; the bias is added after it.
            sinks: float32 [query heads], contiguous, or None; see the reference.
        """
        compiled = library()
        assert compiled is not None
        for tensor in (queries, out):
            assert tensor.dtype == self.kv.pages.dtype
            assert tensor.stride()[1:] == (tensor.shape[2], 1)
        getattr(compiled, FUNCTIONS[queries.dtype])(
            ctypes.byref(self._batch),
            queries.data_ptr(),
            queries.stride(0),
            out.data_ptr(),
            out.stride(0),
            layer,
            self.kv.layer_bases[layer],
            scale,
            0 if sinks is None else sinks.data_ptr(),
        )
