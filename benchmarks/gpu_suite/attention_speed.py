"""Decode attention over compacted slots: against memory bandwidth, and against FlashAttention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_suite.report import Report, Row
from benchmarks.gpu_suite.timing import Work, copy_bandwidth, device, replayed
from vllm_am.compaction.pages import PagedKV, page_table
from vllm_am.kernels.attention import CompactedAttentionWorkspace, RowTables, attend_compacted


def decode_row(
    rows: int, slots: int, *, kv_heads: int, group: int, dim: int, block: int, uneven: bool
) -> Row:
    """One decode step of ``rows`` sequences that are all compact.

    Args:
        slots: per KV head on average; 0: nothing is compacted, as where the flag is on in vain.
        uneven: heads have 0.25 to 1.75 times the average instead of all the same.
    """
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float16
    pages_per_head = slots // block
    shares = torch.linspace(0.25, 1.75, kv_heads) if uneven else torch.ones(kv_heads)
    counts = (shares * pages_per_head).round().long().clamp(min=1).tolist()
    total = rows * sum(counts)
    generator = torch.Generator(device()).manual_seed(0)
    # One layer of `kv_heads` heads; a block more than needed, so that ids are not a plain range.
    blocks = -(-total // kv_heads) + 1
    cache = torch.randn(
        blocks, kv_heads, block, 2 * dim, device=device(), dtype=dtype, generator=generator
    )
    kv = PagedKV.from_layers([cache])
    kv.bias.normal_(generator=generator)
    order = torch.randperm(blocks * kv_heads)[:total].split(counts * rows)
    tables = [
        page_table(order[r * kv_heads : (r + 1) * kv_heads]).to(device()) for r in range(rows)
    ]
    query = torch.randn(rows, kv_heads * group, dim, device=device(), dtype=dtype)
    output = torch.zeros_like(query)
    lse = torch.full((kv_heads * group, rows), float("-inf"), device=device())
    loc = torch.arange(rows + 1, dtype=torch.int32, device=device())
    pointers = torch.tensor([t.data_ptr() if slots else 0 for t in tables], device=device())
    active = torch.full((1,), int(slots > 0), dtype=torch.int32, device=device())
    workspace = CompactedAttentionWorkspace(rows, kv_heads, group, dim, device())

    works: dict[str, Work] = {
        "ours": lambda: attend_compacted(
            query,
            output,
            lse,
            kv,
            0,
            RowTables(loc, pointers, active),
            workspace,
            scale=dim**-0.5,
            max_query_len=1,
        )
    }
    if torch.cuda.is_available() and slots and not uneven:
        works["FlashAttention"] = _flash_attention(query, cache, rows, slots, loc)
    times = replayed(works)
    moved = slots and sum(counts) * rows * block * (2 * dim * cache.itemsize + 4)
    row: Row = {
        "sequences": rows,
        "slots per head": slots,
        "heads": "uneven" if uneven else "even",
        "us": 1e6 * times["ours"],
        "GB/s": moved / times["ours"] / 1e9,
    }
    if "FlashAttention" in times:
        row["FlashAttention us"] = 1e6 * times["FlashAttention"]
        row["ours / FlashAttention"] = times["ours"] / times["FlashAttention"]
    return row


def _flash_attention(
    query: torch.Tensor, cache: torch.Tensor, rows: int, slots: int, loc: torch.Tensor
) -> Work:
    """vLLM's FlashAttention without a bias over as many slots of the same cache."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
    )

    keys, values = cache.transpose(1, 2).split(cache.shape[3] // 2, dim=-1)
    blocks = slots // cache.shape[2]
    table = torch.randperm(rows * blocks, device=query.device).to(torch.int32).view(rows, blocks)
    lengths = torch.full((rows,), slots, dtype=torch.int32, device=query.device)
    out = torch.empty_like(query)
    version = get_flash_attn_version()
    return lambda: flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        out=out,
        cu_seqlens_q=loc,
        max_seqlen_q=1,
        seqused_k=lengths,
        max_seqlen_k=slots,
        block_table=table,
        causal=True,
        softmax_scale=query.shape[2] ** -0.5,
        fa_version=version,
    )


def report(smoke: bool) -> Report:
    """The suite's part ``attention``."""
    shape = {"kv_heads": 8, "group": 4, "dim": 128, "block": 16}
    sizes = [(rows, slots) for rows in (1, 16, 64, 256) for slots in (320, 1632, 6544)]
    if smoke:
        shape, sizes = {"kv_heads": 2, "group": 2, "dim": 32, "block": 16}, [(2, 96)]
    bandwidth = copy_bandwidth(1 << 20 if smoke else 4 << 30)

    def rows() -> Iterator[Row]:
        for sequences in sorted({sequences for sequences, _ in sizes}):
            yield decode_row(sequences, 0, uneven=False, **shape)
        for sequences, slots in sizes:
            for uneven in (False, True):
                row = decode_row(sequences, slots, uneven=uneven, **shape)
                row["share of copy bandwidth"] = float(str(row["GB/s"])) * 1e9 / bandwidth
                yield row

    notes = [
        f"Measured copy bandwidth: {bandwidth / 1e9:.0f} GB/s (read and written).",
        "Qwen3-4B's attention: 8 KV heads, 4 query heads each, size 128, pages of 16 slots. "
        "Uneven heads have 0.25 to 1.75 times the slots.",
        "Targets: at least 80 % of the copy bandwidth from 64 sequences on; at most 1.10x of "
        "FlashAttention over as many slots. Times are of replayed CUDA graphs, the L2 cache cold.",
    ]
    return Report("attention", "Decode attention over compacted slots", rows(), notes)
