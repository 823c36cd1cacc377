"""The stages of a compaction and of a decode step, run on paper."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.gpu_cost.counting import Counts, Launch, counting
from benchmarks.gpu_cost.kernel_costs import KERNEL_COSTS
from benchmarks.uneven_budgets import uneven_budgets
from vllm_am.compaction.compact import evaluate_fit
from vllm_am.compaction.fit_bias import fit_bias
from vllm_am.compaction.fit_values import fit_values
from vllm_am.compaction.pages import PagedKV
from vllm_am.compaction.result import take
from vllm_am.compaction.select_keys import top_keys
from vllm_am.compaction.statistics import attention_statistics

META = torch.device("meta")
#: Tokens of a block.
BLOCK = 16


@dataclass(frozen=True)
class Stage:
    """What one stage of one slice costs; the whole compaction has ``slices`` of them."""

    name: str
    counts: Counts
    slices: float


def slice_stages(case: Case, heads: int, ratio: float) -> Iterator[Stage]:
    """Stages of the fit of one slice of ``heads`` heads, and all of it as the worker runs it."""
    tokens, queries, dim = case.tokens_per_fit, case.queries, case.head_dim
    slots = math.ceil(ratio * tokens)
    scale = dim**-0.5
    slices = case.segments * case.heads / heads
    keys = torch.empty(heads, tokens, dim, dtype=torch.bfloat16, device=META)
    values = torch.empty_like(keys)
    reference = torch.empty(heads, queries, dim, dtype=torch.bfloat16, device=META)
    bias = torch.empty(heads, tokens, device=META)
    chunk_bytes = 512 << 20
    options = {"scale": scale, "chunk_bytes": chunk_bytes}

    with counting(KERNEL_COSTS) as counts:
        statistics = attention_statistics(keys, values, reference, **options)
        indices = top_keys(
            statistics.scores["rms"], torch.empty(heads, dtype=torch.int64, device=META), slots
        )
        kept = take(keys, values, bias, indices)
    yield Stage("select keys", counts, slices)
    with counting(KERNEL_COSTS) as counts:
        fit_bias(kept.keys, kept.bias, reference, statistics.lse, **options)
    yield Stage("fit bias", counts, slices)
    with counting(KERNEL_COSTS) as counts:
        fit_values(kept.keys, kept.bias, kept.values, reference, statistics.output, **options)
    yield Stage("fit values", counts, slices)
    with counting(KERNEL_COSTS) as counts:
        evaluate_fit(kept, keys, values, reference[:, : queries // 8], **options)
    yield Stage("evaluate", counts, slices)
    yield Stage("all, as a worker runs it", worker_slice(case, heads, ratio), slices)
    counts = worker_slice(case, heads, ratio, uneven=True)
    yield Stage("all, heads of different sizes", counts, slices)


def worker_slice(case: Case, heads: int, ratio: float, uneven: bool = False) -> Counts:
    """One slice from the pages to the pages: what the stages are called by is in it.

    Args:
        uneven: budgets as heads of a real model get them by their scores, which are measured in
            another slice; all alike otherwise.
    """
    # Here: the engine's rooms import vLLM.
    from vllm_am.config import CompactionConfig
    from vllm_am.engine.messages import FitSlice, HeadRange, Segment
    from vllm_am.engine.worker.fitting import FitProgress, Fitting
    from vllm_am.engine.worker.rotary import Rotary
    from vllm_am.engine.worker.state import FIT_TEMPORARIES, SLICE_BYTES

    layers = heads // case.kv_heads
    blocks = -(-case.tokens_per_fit // BLOCK)
    target = -(-round(ratio * case.tokens_per_fit) // BLOCK)
    storage = torch.empty(
        layers,
        blocks + target + 1,
        case.kv_heads,
        BLOCK,
        2 * case.head_dim,
        dtype=torch.bfloat16,
        device=META,
    )
    kv = PagedKV.from_layers(list(storage))
    positions = -(-case.queries // case.group_size)
    query_heads = case.kv_heads * case.group_size
    pools = [
        torch.empty(positions, query_heads, case.head_dim, dtype=torch.bfloat16, device=META)
        for _ in range(layers)
    ]
    rotary = Rotary(torch.empty(case.head_dim // 2, dtype=torch.float64, device=META), False)
    config = CompactionConfig(ratio=ratio, budgets="uniform")
    shares = uneven_budgets(heads, case.tokens_per_fit, ratio).double() if uneven else None
    chunk_bytes = SLICE_BYTES // FIT_TEMPORARIES  # as where no more than this is kept free
    fitting = Fitting(
        config, kv, pools, case.head_dim**-0.5, shares, [rotary] * layers, chunk_bytes
    )
    source = range(1, 1 + blocks)
    into = tuple(range(1 + blocks, 1 + blocks + target))
    fit = FitSlice(
        job_id=0,
        request_id="",
        segment=Segment(0, case.tokens_per_fit, target * BLOCK, into),
        source_block_ids=tuple(source),
        query_slots=np.arange(positions),
        query_shifts=np.zeros(positions, dtype=np.int64),
        method=config.method,
        heads=HeadRange(0, heads, heads),
    )
    progress = FitProgress(kv.block_pages(list(source)))
    with counting(KERNEL_COSTS) as counts:
        fitting._run_slice(fit, progress)
    assert progress.heads == heads
    return counts


def decode(case: Case, sequences: int, slots: int) -> Counts:
    """Attention of one layer over the compacted part of so many sequences."""
    from vllm_am.kernels.attention import (
        CompactedAttentionWorkspace,
        RowTables,
        attend_compacted,
    )

    dim, heads = case.head_dim, case.kv_heads
    query = torch.empty(sequences, heads * case.group_size, dim, dtype=torch.bfloat16, device=META)
    storage = torch.empty(2, heads, BLOCK, 2 * dim, dtype=torch.bfloat16, device=META)
    with counting(KERNEL_COSTS) as counts:
        attend_compacted(
            query,
            torch.empty_like(query),
            torch.empty(heads * case.group_size, sequences, device=META),
            PagedKV.from_layers([storage]),
            0,
            RowTables(
                torch.empty(sequences + 1, dtype=torch.int32, device=META),
                torch.empty(sequences, dtype=torch.int64, device=META),
                torch.empty(1, dtype=torch.int32, device=META),
            ),
            CompactedAttentionWorkspace(sequences, heads, case.group_size, dim, META),
            scale=dim**-0.5,
            max_query_len=1,
        )
    # What the kernel reads is known to the page tables alone.
    entry = 2 * dim * query.itemsize + 4
    moved = sequences * heads * slots * entry + 2 * query.nbytes
    flop = 4.0 * sequences * heads * case.group_size * slots * dim
    counts.launches = [
        Launch(x.name, flop, "bf16", moved)
        for x in counts.launches
        if x.name == "attend_compacted"  # not what its workspace was made by
    ]
    return counts
