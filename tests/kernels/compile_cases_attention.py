"""Attention over compacted slots at every head size, and the live part's tables."""

from __future__ import annotations

from functools import partial

import torch

from tests.kernels.compile_only import CompileCase
from vllm_am.compaction.pages import PagedKV
from vllm_am.kernels.attention import (
    CompactedAttentionWorkspace,
    QueryCapture,
    RowTables,
    attend_compacted,
)
from vllm_am.kernels.live_tables import live_tables


def attend(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    max_query_len: int,
    *,
    block_size: int = 16,
    split: bool = True,
    capture: bool = False,
) -> None:
    heads, rows = 2, 3
    tokens = rows * max_query_len
    kv = PagedKV.from_layers([torch.zeros(4, heads, block_size, 2 * head_dim, dtype=dtype)])
    query = torch.zeros(tokens, heads * group, head_dim, dtype=dtype)
    workspace = CompactedAttentionWorkspace(
        rows,
        heads,
        group,
        head_dim,
        query.device,
        max_query_len=max_query_len if split else 1,
    )
    attend_compacted(
        query,
        torch.zeros_like(query),
        torch.zeros(heads * group, tokens),
        kv,
        0,
        RowTables(torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)),
        workspace,
        scale=1.0,
        max_query_len=max_query_len,
        capture=QueryCapture(torch.full((tokens,), -1), query.clone()) if capture else None,
    )


def tables() -> None:
    rows, width = 2, 4
    lengths = torch.zeros(rows, dtype=torch.int32)
    table = torch.zeros(rows, width, dtype=torch.int32)
    gaps = torch.zeros(rows, 2, dtype=torch.int32)
    addresses = torch.zeros(rows, dtype=torch.int64)
    live_tables(
        table,
        lengths,
        gaps,
        table.clone(),
        lengths.clone(),
        addresses,
        num_rows=rows,
        block_size=16,
    )


#: Bytes that threads spill, in the worst of the architectures; 0 in all other cases.
SPILLS = {
    "decode-d192": 16,
    "verify-16-tokens": 64,
    "chunk-d192": 368,
    "chunk-d256": 320,
    "chunk-group7-fp16-capture": 8,
}


def case(name: str, dtype: torch.dtype, *arguments, **options) -> CompileCase:
    fast = dtype != torch.float32  # which is multiplied exactly, and served nowhere
    return CompileCase(
        name,
        partial(attend, dtype, *arguments, **options),
        ("attend_compacted_kernel",),
        spill_limit=SPILLS.get(name, 0) if fast else None,
        on_tensor_cores=fast,
    )


BF16, FP16 = torch.bfloat16, torch.float16

CASES = [
    *(case(f"decode-d{d}", BF16, d, 4, 1) for d in (64, 80, 96, 112, 128, 192, 256)),
    *(case(f"decode-page{n}", BF16, 128, 8, 1, block_size=n) for n in (32, 64, 128)),
    case("decode-mha-fp16-capture", FP16, 128, 1, 1, capture=True),
    case("verify-16-tokens", BF16, 128, 8, 16),
    *(case(f"chunk-d{d}", BF16, d, 4, 512, split=False) for d in (64, 80, 96, 112, 128, 192, 256)),
    case("chunk-group7-fp16-capture", FP16, 128, 7, 512, split=False, capture=True),
    case("chunk-d256-fp32", torch.float32, 256, 1, 512, split=False),
    CompileCase("live-tables", tables, ("live_tables_kernel",)),
]
