# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention over the compacted part of sequences, merged with the attention over their live part.

A compacted head is a list of pages of its own (``vllm_am.compaction.pages``) whose slots carry an
additive bias. FlashAttention knows neither, so it attends to the live tokens only, and returns its
log-sum-exp; one kernel then attends to the compacted slots and merges the two parts in place. All
compacted slots precede all queries of a step: there is no causal mask.

With s_j = scale q.k_j + b_j over the slots j, and (o, lse) of the live part, the output becomes

    (exp(lse) o + sum_j exp(s_j) v_j) / (exp(lse) + sum_j exp(s_j)).

The query heads that share a KV head, times some query tokens, are the rows of one tile, so that
pages are read once for all of them. There are two ways through the kernel:

- *Split*, for rows with few tokens (decode, verification of drafts), also in a step with a chunk of
  another row's prefill: a head's slots are divided among programs, which leave partial sums in a
  workspace; the last one to arrive adds them up.
  It adds them in the order of the splits, so the result does not depend on who is last.
  (A second kernel to add them would be one more launch in every layer of every step, also when
  nothing is compacted.)
- *Chunk*, for prefill: tiles of query tokens, each over all of the head's slots.

No launch depends on data on the device, nothing is allocated and nothing waits for the device:
the kernel can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vllm_am.compaction.attend import attend, merge
from vllm_am.compaction.pages import PagedKV, read_pages
from vllm_am.kernels.attention_kernel import LOG2E, attend_compacted_kernel

#: Keys and values of one step of the loop. Two or three of these in flight per multiprocessor are
#: what it takes to cover the latency of HBM (about 1 us x 35 bytes/ns on an H200).
_TILE_BYTES = 32 << 10

#: Query rows (tokens x query heads of a KV head) of a tile in the chunk regime, and the bytes that
#: they may have.
_CHUNK_ROWS = 128
_CHUNK_BYTES = 64 << 10

#: A split reads at least this many slots: less does not pay for its partial sums.
_MIN_SPLIT_SLOTS = 256

#: More splits make the addition of the partial sums, which is serial, the longest part.
_MAX_SPLITS = 64

#: Programs that a split launch aims at, per multiprocessor. Shared memory lets two or three run at
#: once: a few waves even out heads of different lengths, and many would make a launch with nothing
#: compacted, whose programs all exit at once, longer.
_PROGRAMS_PER_MULTIPROCESSOR = 8


@dataclass(frozen=True)
class RowTables:
    """The rows (sequences) of a batch, on the device; padded rows have no tokens and table 0.

    Attributes:
        query_start_loc: int32 [rows + 1], first token of each row.
        page_tables: int64 [rows], device address of the row's page table (``pages.page_table``,
            int32), or 0 if nothing of the row is compacted. Whoever writes the addresses keeps
            the tables alive.
        active: int32 [1] or None; 0: no row has anything compacted, and no query is captured. The
            launch is over at once then, without a look at any row.
    """

    query_start_loc: Tensor
    page_tables: Tensor
    active: Tensor | None = None


@dataclass(frozen=True)
class QueryCapture:
    """Where to keep queries that later serve as reference queries.

    Attributes:
        slots: int64 [tokens], position in ``pool`` or -1. Distinct where not -1.
        pool: [positions, Hq, D], last dimension contiguous.
    """

    slots: Tensor
    pool: Tensor


@dataclass(frozen=True)
class Tile:
    """How a program works: query rows and slots per step, warps, and stages of its pipeline."""

    rows: int
    slots: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, head_dim: int, itemsize: int, shared_memory: int) -> Tile:
        """A tile of at least ``rows`` query rows that fits ``shared_memory`` bytes per block."""
        rows = max(16, triton.next_power_of_2(rows))  # 16: the smallest matrix product
        width = triton.next_power_of_2(head_dim) * itemsize
        slots = min(128, max(16, _TILE_BYTES // (2 * width)))
        # Besides the stages: the queries and the softmax weights.
        room = shared_memory - rows * (width + slots * itemsize)
        stages = min(3, max(2, room // (2 * width * slots)))
        return cls(rows, slots, warps=8 if rows >= 128 else 4, stages=stages)


class CompactedAttentionWorkspace:
    """Scratch memory of ``attend_compacted``, made once, before graphs are captured.

    Launches that share a workspace must be ordered, as those of one stream are. What lies in it
    between launches is the arrival counters, all 0.

    Args:
        max_rows: rows of the largest batch.
        num_kv_heads: KV heads of a layer (of this rank).
        group: query heads per KV head.
        head_dim: D.
        device: where.
        max_query_len: rows with up to so many tokens are split (while they make a tile of no more
            rows than a chunk's), others are not: 1 plus the number of speculative tokens.
        programs: how many programs a split launch may have before rows x heads alone exceed it;
            by default a multiple of the multiprocessors.
    """

    def __init__(
        self,
        max_rows: int,
        num_kv_heads: int,
        group: int,
        head_dim: int,
        device: torch.device,
        *,
        max_query_len: int = 1,
        programs: int | None = None,
    ) -> None:
        multiprocessors, self.shared_memory = _device_limits()
        self.max_rows = max_rows
        self.num_kv_heads = num_kv_heads
        self.group = group
        self.head_dim = head_dim
        self.max_query_len = max_query_len
        self.programs = programs or _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        query_rows = self.programs * group * max_query_len
        # Of each program and query row: the maximum and the sum of the weights, and the output.
        self.maxima = torch.empty(query_rows, dtype=torch.float32, device=device)
        self.sums = torch.empty(query_rows, dtype=torch.float32, device=device)
        self.outputs = torch.empty(query_rows, head_dim, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device)

    def splits(self, rows: int) -> int:
        """Splits per (row, KV head). Depends on the size of the batch only, not on lengths."""
        return min(_MAX_SPLITS, max(1, self.programs // (rows * self.num_kv_heads)))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.maxima, self.sums, self.outputs, self.arrivals))


def _device_limits() -> tuple[int, int]:
    """Multiprocessors of the current device, and bytes of shared memory that a block may have.

    Asked of Triton's driver rather than of torch: it also answers when kernels are compiled for a
    GPU that is not there.
    """
    if triton.knobs.runtime.interpret:
        return 4, 227 << 10
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def attend_compacted(
    query: Tensor,
    output: Tensor,
    live_lse: Tensor,
    kv: PagedKV,
    layer: int,
    rows: RowTables,
    workspace: CompactedAttentionWorkspace,
    *,
    scale: float,
    max_query_len: int,
    capture: QueryCapture | None = None,
) -> None:
    """Add a layer's compacted slots to the attention over the live tokens, in place.

    Args:
        query: [tokens, Hq, D], last dimension contiguous. Hq = group x KV heads, in that order.
        output: [tokens, Hq, D], last dimension contiguous; in: attention over the live tokens,
            out: attention over both. Untouched, byte for byte, where a query sees no compacted
            slot, and in tokens of no row.
        live_lse: float32 [Hq, tokens], natural log-sum-exp over the live tokens; -inf (or, as
            FlashAttention 2 has it, +inf) where there are none: ``output`` is not read then.
        kv: pages in the dtype of ``query``. In pages of compacted sequences the slots that are
            not used have bias -inf and finite keys and values.
        layer: index into ``kv.layer_bases``.
        rows: at most ``workspace.max_rows`` of them.
        scale: of the scores; the bias is added after scaling.
        max_query_len: upper bound of the tokens of a row.
        capture: if given, the queries of these tokens (of all rows, compacted or not) are stored.

    Raises:
        ValueError: tensors and workspace do not fit each other.
    """
    tokens, num_query_heads, head_dim = query.shape
    heads, group = kv.num_kv_heads, workspace.group
    num_rows = rows.page_tables.shape[0]
    if (heads, heads * group, head_dim) != (
        workspace.num_kv_heads,
        num_query_heads,
        workspace.head_dim,
    ) or kv.pages.shape[2] != 2 * head_dim:
        raise ValueError(
            f"{num_query_heads} query heads of size {head_dim}, {heads} KV heads with entries of "
            f"{kv.pages.shape[2]}, workspace for {workspace.num_kv_heads} x {group} of size "
            f"{workspace.head_dim}"
        )
    if num_rows > workspace.max_rows:
        raise ValueError(f"{num_rows} rows, workspace for {workspace.max_rows}")
    if rows.query_start_loc.shape[0] != num_rows + 1:
        raise ValueError("query_start_loc must have one element more than page_tables")
    if query.stride(2) != 1 or output.stride(2) != 1 or live_lse.stride(1) != 1:
        raise ValueError("the last dimension of query, output and live_lse must be contiguous")
    if capture is not None and capture.pool.stride(2) != 1:
        raise ValueError("the last dimension of the query pool must be contiguous")
    if num_rows == 0 or tokens == 0:
        return

    # Rows of few tokens are split, others go tile by tile; a step that mixes them has both.
    few = min(workspace.max_query_len, _CHUNK_ROWS // group)
    launches = []
    if few > 0:
        launches.append((True, 1, min(few, max_query_len)))
    if max_query_len > few:
        launches.append((False, few + 1, tokens))
    for split, least_tokens, most_tokens in launches:
        if split:
            query_rows = group * most_tokens
        else:
            width = triton.next_power_of_2(head_dim) * query.itemsize
            query_rows = max(group, min(_CHUNK_ROWS, _CHUNK_BYTES // width))
        tile = Tile.of(query_rows, head_dim, query.itemsize, workspace.shared_memory)
        if split:
            grid = (workspace.splits(num_rows), heads, num_rows)
        else:
            # A row has a block more than its share of the tokens, however they are distributed.
            grid = (tokens // (tile.rows // group) + num_rows, heads, 1)
        attend_compacted_kernel[grid](
            query,
            output,
            live_lse,
            kv.pages,
            kv.bias,
            rows.query_start_loc,
            rows.page_tables,
            rows.active,
            None if capture is None else capture.slots,
            None if capture is None else capture.pool,
            workspace.maxima,
            workspace.sums,
            workspace.outputs,
            workspace.arrivals,
            num_rows,
            least_tokens,
            most_tokens,
            layer * heads,
            group * workspace.max_query_len,
            scale * LOG2E.value,
            query.stride(0),
            query.stride(1),
            output.stride(0),
            output.stride(1),
            live_lse.stride(0),
            0 if capture is None else capture.pool.stride(0),
            0 if capture is None else capture.pool.stride(1),
            H=heads,
            G=group,
            D=head_dim,
            N=kv.page_size,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.slots,
            BLOCK_D=triton.next_power_of_2(head_dim),
            MIN_TILES=max(1, _MIN_SPLIT_SLOTS // tile.slots),
            SPLIT=split,
            CAPTURE=capture is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def attend_compacted_reference(
    query: Tensor,
    output: Tensor,
    live_lse: Tensor,
    kv: PagedKV,
    layer: int,
    query_start_loc: Sequence[int],
    page_tables: Sequence[Tensor | None],
    *,
    scale: float,
) -> Tensor:
    """What ``attend_compacted`` makes of ``output``, in plain torch and fp64.

    Args:
        page_tables: of each row, int32 as by ``pages.page_table``; None if nothing is compacted.

    Returns:
        float64 [tokens, Hq, D].
    """
    result = output.double()
    group = query.shape[1] // kv.num_kv_heads
    for row, table in enumerate(page_tables):
        tokens = slice(query_start_loc[row], query_start_loc[row + 1])
        if table is None or tokens.start == tokens.stop:
            continue
        for head in range(kv.num_kv_heads):
            begin, end = table[layer * kv.num_kv_heads + head :][:2].tolist()
            ids = table[begin:end].long()[None]
            keys, values = (part.double() for part in read_pages(kv, ids))
            heads = slice(head * group, (head + 1) * group)
            live = result[tokens, heads].transpose(0, 1)
            part, lse = attend(
                query[tokens, heads].transpose(0, 1).double(),
                keys,
                values,
                kv.bias[ids].flatten(1),
                scale=scale,
            )
            both, _ = merge([live, part], [live_lse[heads, tokens].double(), lse])
            seen = (lse > -torch.inf).unsqueeze(-1)
            result[tokens, heads] = torch.where(seen, both, live).transpose(0, 1)
    return result
