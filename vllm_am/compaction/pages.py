"""Pages: where compacted heads live in a paged KV cache, and how spans are read and written.

A page is ``PAGE_SLOTS`` slots of one head: keys and values ``[page_size, 2 * D]``, contiguous. What
one head has of a block of vLLM's is one page or several, one behind the other, so that budgets are
as fine in large blocks as in small ones. vLLM keeps the pages of all layers in one allocation, so a
page of a compacted sequence may belong to any (layer, KV head), whichever layer's storage it lies
in: heads get as many pages as they need, and the blocks that a sequence holds are the sum of its
heads' budgets. Plain torch, no vLLM; the GPU's page writer is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_am.compaction.accelerate import goes_to_kernel
from vllm_am.compaction.streaming import to_device

#: Slots of a page, where blocks can be divided into such.
PAGE_SLOTS = 16


def page_slots(block_size: int) -> int:
    """Slots of a page in blocks of so many tokens."""
    return PAGE_SLOTS if block_size % PAGE_SLOTS == 0 else block_size


class HeadSlots(Protocol):
    """What heads hold, as a fit leaves it: a ``CompactedKV``, or one that was read from a file."""

    @property
    def keys(self) -> Tensor:
        """[H, t, D]; the first ``lengths[h]`` slots of each head count."""

    @property
    def values(self) -> Tensor:
        """[H, t, D]."""

    @property
    def bias(self) -> Tensor:
        """[H, t] float32."""

    @property
    def lengths(self) -> Tensor:
        """[H] int64."""


@dataclass(frozen=True)
class PagedKV:
    """All pages of a KV cache (of one rank), with the bias of every slot.

    Attributes:
        pages: [num_pages, page_size, 2 * D], keys then values; a view of vLLM's allocation.
        bias: float32 [num_pages, page_size], -inf in unused slots of compacted pages. Only pages
            of compacted sequences have a bias; in all others it is not read.
        layer_bases: first page of (block 0, KV head 0) by layer. The first of (layer, block, head)
            is ``layer_bases[layer] + block * block_stride + head * pages_per_block``.
        block_stride: pages from one block to the next.
        num_kv_heads: KV heads of a layer.
        pages_per_block: of one head, one behind the other.
    """

    pages: Tensor
    bias: Tensor
    layer_bases: tuple[int, ...]
    block_stride: int
    num_kv_heads: int
    pages_per_block: int = 1

    @property
    def num_heads(self) -> int:
        """(layer, KV head) pairs; pair ``layer * num_kv_heads + head`` is "head" below."""
        return len(self.layer_bases) * self.num_kv_heads

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.pages.shape[1]

    @property
    def block_size(self) -> int:
        """Slots that a head has in a block."""
        return self.page_size * self.pages_per_block

    @classmethod
    def from_layers(cls, caches: Sequence[Tensor], page_size: int | None = None) -> PagedKV:
        """Over the layers' caches ``[num_blocks, H, block_size, 2 * D]``, views of one allocation.

        Args:
            page_size: slots of a page, a divisor of ``block_size``; by default as many.

        Raises:
            ValueError: the layers are not dense head-major views of one storage.
        """
        first = caches[0]
        _, heads, block_size, width = first.shape
        size = page_size or block_size
        page = size * width
        storage = first.untyped_storage()
        numel = storage.nbytes() // first.itemsize
        for cache in caches:
            same = cache.untyped_storage().data_ptr() == storage.data_ptr()
            strides = (block_size * width, width, 1)
            dense = cache.shape[1:] == first.shape[1:] and cache.stride()[1:] == strides
            whole = cache.stride(0) == first.stride(0) and cache.stride(0) % page == 0
            if not (same and dense and whole and cache.storage_offset() % page == 0):
                raise ValueError(
                    "the layers' KV caches are not head-major views of one allocation: "
                    f"shape {tuple(cache.shape)}, strides {cache.stride()}, "
                    f"offset {cache.storage_offset()}"
                )
        pages = first.as_strided((numel // page, size, width), (page, width, 1), 0)
        return cls(
            pages=pages,
            bias=torch.zeros(pages.shape[:2], dtype=torch.float32, device=first.device),
            layer_bases=tuple(cache.storage_offset() // page for cache in caches),
            block_stride=first.stride(0) // page,
            num_kv_heads=heads,
            pages_per_block=block_size // size,
        )

    def block_pages(self, block_ids: Sequence[int] | Tensor) -> Tensor:
        """int64 [heads, blocks * pages_per_block] on the CPU: the pages of whole blocks, by (layer,
        KV head), in the order of their slots."""
        layers = torch.tensor(self.layer_bases)[:, None, None, None]
        blocks = torch.as_tensor(block_ids, dtype=torch.int64)[:, None] * self.block_stride
        heads = torch.arange(self.num_kv_heads)[:, None, None] * self.pages_per_block
        pages = layers + heads + blocks + torch.arange(self.pages_per_block)
        return pages.flatten(2).flatten(0, 1)


def page_table(lists: Sequence[Tensor]) -> Tensor:
    """The page lists of a sequence's heads as one tensor, as the attention kernels read it.

    Args:
        lists: page ids of each head, int [n_h].

    Returns:
        int32 [heads + 1 + sum n_h]: for head h its ids are ``table[table[h] : table[h + 1]]``.
    """
    counts = torch.tensor([0, *(len(ids) for ids in lists)])
    starts = counts.cumsum(0) + len(counts)
    return torch.cat([starts, *lists]).to(torch.int32)


def read_pages(kv: PagedKV, page_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole pages, in order.

    Args:
        page_ids: int64 [heads, n].

    Returns:
        keys and values, each [heads, n * page_size, D] in the cache's dtype (copies).
    """
    entries = kv.pages[page_ids].flatten(1, 2)
    head_dim = entries.shape[-1] // 2
    return entries[..., :head_dim], entries[..., head_dim:]


def read_segments(kv: PagedKV, page_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What compacted heads hold, heads of fewer pages padded: what a merge starts from.

    Args:
        page_ids: int64 [heads, n], -1 where a head has no page.

    Returns:
        keys and values, each [heads, n * page_size, D] in the cache's dtype, and bias float32
        [heads, n * page_size], -inf where there is no slot; keys and values are 0 there.
    """
    missing = (page_ids < 0).unsqueeze(2)
    present = page_ids.clamp(min=0)
    bias = kv.bias[present].masked_fill(missing, float("-inf")).flatten(1)
    keys, values = read_pages(kv, present)
    # What lies there may be anything, and a weight of 0 does not silence a NaN.
    unused = bias.isneginf().unsqueeze(2)
    return keys.masked_fill(unused, 0), values.masked_fill(unused, 0), bias


def write_pages(kv: PagedKV, lists: Sequence[Tensor], compacted: HeadSlots) -> None:
    """Write each head's compacted slots into its pages; slots left over get bias -inf.

    Args:
        kv: written in place.
        lists: page ids of each head, with room for its ``lengths[h]`` slots.
        compacted: of as many heads as there are lists.

    Raises:
        ValueError: a head has more slots than its pages; nothing is written then.
    """
    if goes_to_kernel(kv.pages):
        from vllm_am.kernels.write_pages import write_pages as launch

        table = to_device(page_table(lists), kv.pages.device)
        kept = compacted
        launch(kv, table, kept.keys, kept.values, kept.bias, kept.lengths)
        return
    size = kv.page_size
    rooms = [len(ids) * size for ids in lists]
    lengths: list[int] = compacted.lengths.tolist()
    if any(length > room for length, room in zip(lengths, rooms, strict=True)):
        raise ValueError(f"pages for {rooms} slots per head cannot hold {lengths}")
    for head, (ids, room) in enumerate(zip(lists, rooms, strict=True)):
        length = min(room, compacted.keys.shape[1])
        entries = kv.pages.new_zeros(room, kv.pages.shape[2])
        keys, values = compacted.keys[head, :length], compacted.values[head, :length]
        entries[:length] = torch.cat([keys, values], dim=-1).to(kv.pages.dtype)
        bias = kv.bias.new_full((room,), float("-inf"))
        bias[:length] = compacted.bias[head, :length]
        kv.pages[ids] = entries.unflatten(0, (len(ids), size))
        kv.bias[ids] = bias.unflatten(0, (len(ids), size))
