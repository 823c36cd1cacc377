"""Pages: where compacted heads live in a paged KV cache, and how spans are read and written.

A page is ``block_size`` slots of one head: keys and values ``[block_size, 2 * D]``, contiguous.
vLLM keeps the pages of all layers in one allocation, so a page of a compacted sequence may belong
to any (layer, KV head), whichever layer's storage it lies in: heads get as many pages as they
need, and the blocks that a sequence holds are the sum of its heads' budgets. Plain torch, no vLLM;
the GPU's page writer is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_am.compaction.accelerate import goes_to_kernel
from vllm_am.compaction.streaming import to_device


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
        pages: [num_pages, block_size, 2 * D], keys then values; a view of vLLM's allocation.
        bias: float32 [num_pages, block_size], -inf in unused slots of compacted pages. Only pages
            of compacted sequences have a bias; in all others it is not read.
        layer_bases: page of (block 0, KV head 0) by layer. Page of (layer, block, head) is
            ``layer_bases[layer] + block * block_stride + head``.
        block_stride: pages from one block to the next.
        num_kv_heads: KV heads of a layer.
    """

    pages: Tensor
    bias: Tensor
    layer_bases: tuple[int, ...]
    block_stride: int
    num_kv_heads: int

    @property
    def num_heads(self) -> int:
        """(layer, KV head) pairs; pair ``layer * num_kv_heads + head`` is "head" below."""
        return len(self.layer_bases) * self.num_kv_heads

    @property
    def block_size(self) -> int:
        return self.pages.shape[1]

    @classmethod
    def from_layers(cls, caches: Sequence[Tensor]) -> PagedKV:
        """Over the layers' caches ``[num_blocks, H, block_size, 2 * D]``, views of one allocation.

        Raises:
            ValueError: the layers are not dense head-major views of one storage.
        """
        first = caches[0]
        _, heads, block_size, width = first.shape
        page = block_size * width
        storage = first.untyped_storage()
        numel = storage.nbytes() // first.itemsize
        for cache in caches:
            same = cache.untyped_storage().data_ptr() == storage.data_ptr()
            dense = cache.shape[1:] == first.shape[1:] and cache.stride()[1:] == (page, width, 1)
            whole = cache.stride(0) == first.stride(0) and cache.stride(0) % page == 0
            if not (same and dense and whole and cache.storage_offset() % page == 0):
                raise ValueError(
                    "the layers' KV caches are not head-major views of one allocation: "
                    f"shape {tuple(cache.shape)}, strides {cache.stride()}, "
                    f"offset {cache.storage_offset()}"
                )
        pages = first.as_strided((numel // page, block_size, width), (page, width, 1), 0)
        return cls(
            pages=pages,
            bias=torch.zeros(pages.shape[:2], dtype=torch.float32, device=first.device),
            layer_bases=tuple(cache.storage_offset() // page for cache in caches),
            block_stride=first.stride(0) // page,
            num_kv_heads=heads,
        )

    def block_pages(self, block_ids: Sequence[int] | Tensor) -> Tensor:
        """int64 [heads, blocks] on the CPU: the pages of whole blocks, by (layer, KV head)."""
        layers = torch.tensor(self.layer_bases)[:, None, None]
        blocks = torch.as_tensor(block_ids, dtype=torch.int64) * self.block_stride
        heads = torch.arange(self.num_kv_heads)[:, None]
        return (layers + heads + blocks).flatten(0, 1)


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
        keys and values, each [heads, n * block_size, D] in the cache's dtype (copies).
    """
    entries = kv.pages[page_ids].flatten(1, 2)
    head_dim = entries.shape[-1] // 2
    return entries[..., :head_dim], entries[..., head_dim:]


def read_segments(kv: PagedKV, page_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What compacted heads hold, heads of fewer pages padded: what a merge starts from.

    Args:
        page_ids: int64 [heads, n], -1 where a head has no page.

    Returns:
        keys and values, each [heads, n * block_size, D] in the cache's dtype, and bias float32
        [heads, n * block_size], -inf where there is no slot; keys and values are 0 there.
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
    size = kv.block_size
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
