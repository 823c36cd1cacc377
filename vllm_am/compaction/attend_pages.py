"""Attention of several sequences over their pages, in plain torch.

The reference of the compiled kernel (``kernels/attend_pages.py``), and what the CPU backend runs
where that does not: in prefill chunks, in float16, without a compiler.

A sequence sees its live tokens and its compacted slots, which have a bias. The keys and values of
all sequences of a batch are gathered in one operation and attended in another: with a call per
sequence, a decode step of a dozen short sequences spends most of its time between the calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_am.compaction.pages import PagedKV

#: Query rows attended at once: bounds the mask and score matrices of long prefill chunks.
QUERY_CHUNK = 256
#: Keys and values gathered at once, unless a single sequence has more: they should still be in the
#: cache when they are attended to.
GATHERED_BYTES = 4 << 20
#: Sequences with as many new tokens go together while the shortest has this share of the longest's
#: pages: less wastes copies of padding, more makes more groups.
LEAST_FILL = 0.6


@dataclass(frozen=True)
class PagedRow:
    """One sequence of the batch.

    Attributes:
        first, last: its newest tokens are the query rows [first, last) of the batch.
        blocks: int64 [b], blocks of its live tokens, in order.
        live_tokens: how many those are, at least ``last - first``.
        compacted: int64 [layers * heads, n], pages of what stands for its other tokens, -1 behind
            the end of a head's list; or None.
    """

    first: int
    last: int
    blocks: Tensor
    live_tokens: int
    compacted: Tensor | None

    @property
    def new(self) -> int:
        return self.last - self.first

    def live_pages(self, page_size: int) -> int:
        """Pages of its live tokens, in each head."""
        return -(-self.live_tokens // page_size)

    def pages(self, page_size: int) -> int:
        """Pages of its longest head."""
        compacted = 0 if self.compacted is None else self.compacted.shape[1]
        return self.live_pages(page_size) + compacted


@dataclass(frozen=True)
class PagedRows:
    """R sequences attended together, with ``new`` query rows each.

    Attributes:
        queries: int64 [R * new], their rows in the batch.
        new: newest tokens of each.
        pages: int64 [layers, R, heads, P]: live pages, then compacted ones; where a head has no
            more, any page at all.
        absent: bool, like ``pages``, where a head has no more.
        compacted: whether there are compacted pages, and so a bias.
        live_tokens: int64 [R]; live_slots: int64 [R], slots of the live pages.
        stale: int64 [k], indices of slots in [R * P * page_size] behind the last token of a live
            page: whoever had the page before may have left anything there.
    """

    queries: Tensor
    new: int
    pages: Tensor
    absent: Tensor
    compacted: bool
    live_tokens: Tensor
    live_slots: Tensor
    stale: Tensor

    @classmethod
    def of(cls, rows: Sequence[PagedRow], kv: PagedKV) -> PagedRows:
        """Rows with equally many new tokens."""
        heads, size = kv.num_kv_heads, kv.page_size
        longest = max(row.pages(size) for row in rows)
        pages = torch.full((len(kv.layer_bases), len(rows), heads, longest), -1)
        stale = []
        for index, row in enumerate(rows):
            live = row.live_pages(size)
            exact = kv.block_pages(row.blocks)[:, :live]
            pages[:, index, :, :live] = exact.unflatten(0, (-1, heads))
            if row.compacted is not None:
                lists = row.compacted.unflatten(0, (-1, heads))
                pages[:, index, :, live : row.pages(size)] = lists
            begin = index * longest * size
            stale.append(torch.arange(begin + row.live_tokens, begin + live * size))
        return cls(
            queries=torch.cat([torch.arange(row.first, row.last) for row in rows]),
            new=rows[0].new,
            pages=pages.clamp(min=0),
            absent=pages < 0,
            compacted=any(row.compacted is not None for row in rows),
            live_tokens=torch.tensor([row.live_tokens for row in rows]),
            live_slots=torch.tensor([row.live_pages(size) * size for row in rows]),
            stale=torch.cat(stale),
        )


def group_rows(rows: Sequence[PagedRow], kv: PagedKV) -> Iterator[PagedRows]:
    """The rows of a batch, in groups that are attended together."""
    page_bytes = kv.num_kv_heads * kv.pages[0].numel() * kv.pages.itemsize
    group: list[PagedRow] = []

    def likeness(row: PagedRow) -> tuple[bool, int, int]:
        return row.compacted is None, row.new, row.pages(kv.page_size)

    for row in sorted(rows, key=likeness, reverse=True):
        if group:
            alike = likeness(row)[:2] == likeness(group[0])[:2]
            longest = group[0].pages(kv.page_size)
            filled = row.pages(kv.page_size) >= LEAST_FILL * longest
            fits = (len(group) + 1) * longest * page_bytes <= GATHERED_BYTES
            if not (alike and filled and fits):
                yield PagedRows.of(group, kv)
                group = []
        group.append(row)
    if group:
        yield PagedRows.of(group, kv)


def attend_pages(
    queries: Tensor,
    kv: PagedKV,
    rows: PagedRows,
    layer: int,
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the newest tokens of some sequences over all that each of them holds.

    Args:
        queries: [R * new, query heads, D], of the rows in their order.
        layer: index of the layer.
        scale: factor on the scores; the bias is added after it.
        sinks: float32 [query heads], the score of one more key of each query head, whose value is
            zero: what a head looks at that has nothing to look for (gpt-oss).

    Returns:
        [R * new, query heads, D] in the dtype of ``queries``.
    """
    pages = rows.pages[layer]
    count, heads, length = pages.shape
    width = kv.pages.shape[2]
    entries = kv.pages.index_select(0, pages.flatten())
    slots = length * kv.page_size
    # What is not the sequence's own is hidden below; but a hidden NaN would still be one.
    entries.view(count, heads, length, -1)[rows.absent[layer]] = 0
    entries = entries.view(count, heads, slots, width)
    entries[rows.stale // slots, :, rows.stale % slots] = 0
    if count == 1 and not rows.compacted:
        entries = entries[:, :, : int(rows.live_tokens[0])]
    # The bias was fitted in float32, and SDPA wants one dtype for mask and operands.
    dtype = torch.float32 if rows.compacted or sinks is not None else queries.dtype
    keys, values = entries.to(dtype).split(width // 2, dim=3)
    new = rows.new
    # [R, H, group, new, D]
    grouped = queries.view(count, new, heads, -1, width // 2).permute(0, 2, 3, 1, 4).to(dtype)
    more = 0
    if sinks is not None:
        # One more key in front, the same for all query heads, and one more dimension in which it
        # alone is not zero: there each query head says what its score is to be.
        more = 1
        keys, values = F.pad(keys, (0, 1, 1, 0)), F.pad(values, (0, 1, 1, 0))
        keys[:, :, 0, -1] = 1
        # Finite: in that dimension, other keys are to have the score 0.
        scores = (sinks.clamp(min=-1e30) / scale).view(1, heads, -1, 1, 1)
        grouped = torch.cat((grouped, scores.expand(*grouped.shape[:4], 1)), dim=4)

    def finish(out: Tensor) -> Tensor:
        return out[..., : width // 2].reshape(queries.shape).to(queries.dtype)

    if new == 1:  # the query heads of a group see the same keys: they are SDPA's query rows
        mask = _mask(kv, rows, layer, 0, 1, entries.shape[2], dtype)
        if mask is not None:
            mask = F.pad(mask, (more, 0))
        out = F.scaled_dot_product_attention(grouped.squeeze(3), keys, values, mask, scale=scale)
        return finish(out)
    # One SDPA batch entry per sequence and KV head, its group of query heads as SDPA's heads.
    grouped = grouped.flatten(0, 1)
    keys = keys.flatten(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)
    values = values.flatten(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)
    parts = []
    alone = count == 1 and not rows.compacted
    for first in range(0, new, QUERY_CHUNK):
        last = min(new, first + QUERY_CHUNK)
        # Nobody sees what comes behind the chunk: of a whole prompt that is half of the work.
        visible = int(rows.live_tokens[0]) - new + last if alone else slots
        mask = _mask(kv, rows, layer, first, last, visible, dtype)
        assert mask is not None
        mask = F.pad(mask, (more, 0))
        if count == 1 and mask.shape[1] == 1:
            mask = mask.view(1, 1, last - first, -1)
        else:
            mask = mask.expand(-1, heads, -1, -1).flatten(0, 1).unsqueeze(1)
        chunk, seen = grouped[:, :, first:last], slice(visible + more)
        out = F.scaled_dot_product_attention(
            chunk, keys[:, :, seen], values[:, :, seen], mask, scale=scale
        )
        parts.append(out)
    out = torch.cat(parts, dim=2).unflatten(0, (count, heads))
    return finish(out.permute(0, 3, 1, 2, 4))


def _mask(
    kv: PagedKV,
    rows: PagedRows,
    layer: int,
    first: int,
    last: int,
    slots: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """[R, heads or 1, last - first, slots], added to the scores of new tokens [first, last).

    Token i of the newest n sees the first ``live_tokens - n + i + 1`` live tokens and every
    compacted slot. None where everything is seen.
    """
    if not rows.compacted and rows.new == 1 and len(rows.pages[0]) == 1:
        return None
    position = torch.arange(slots)
    newest = rows.live_tokens - rows.new
    seen = position <= newest[:, None, None] + torch.arange(first, last)[:, None]
    causal = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf")).unsqueeze(1)
    if not rows.compacted:
        return causal
    bias = kv.bias[rows.pages[layer]].masked_fill_(rows.absent[layer].unsqueeze(3), float("-inf"))
    live = (position < rows.live_slots.unsqueeze(1))[:, None, None]
    return torch.where(live, causal, bias.flatten(2).unsqueeze(2))
