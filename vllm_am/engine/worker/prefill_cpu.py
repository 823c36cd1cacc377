"""Prefill chunks of exact sequences on the CPU: vLLM's own kernel, over a copy of what they hold.

vLLM symbols touched: ``v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder`` (used as it
is), ``v1.attention.backend.CommonAttentionMetadata`` (read).

That kernel packs keys in a tile order of its own, which neither a fit nor a per-key bias can share,
but it multiplies at nearly twice the speed of torch's. So what an exact sequence holds is copied
into a scratch cache in its order, layer by layer: T entries, beside the scores of n new tokens on
T. Decoding, one token on T, is left to our own kernel, which reads the pages where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_am.compaction.attend_pages import PagedRow
from vllm_am.compaction.pages import PagedKV
from vllm_am.engine.footprint import ceil_div

#: Slots of a block of the scratch cache; vLLM's kernels want multiples of 32.
SCRATCH_BLOCK = 128

#: Bound of the scratch cache, unless a single sequence has more: rows go in several groups then.
SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class ExactPrefill:
    """Some exact rows of one batch, the same in all layers.

    Attributes:
        queries: their rows in the batch, in order.
        pages: by row, int64 [layers, heads, b]: the pages of its tokens.
        tokens: by row, how many those are.
        slots: by row, int64 [tokens]: where they go in the scratch cache.
        ends: by row, its last block there, of which it fills a part.
        scratch: [blocks, heads, SCRATCH_BLOCK, 2 D], written anew by every group in every layer.
        metadata: vLLM's, of a batch of these rows over the scratch cache.
    """

    queries: slice | torch.Tensor
    pages: list[torch.Tensor]
    tokens: list[int]
    slots: list[torch.Tensor]
    ends: list[int]
    scratch: torch.Tensor
    metadata: CPUAttentionMetadata

    def __call__(
        self,
        impl: CPUAttentionBackendImpl,
        layer: Any,
        kv: PagedKV,
        index: int,
        query: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attention of all its rows in one layer.

        Args:
            impl: the layer's, whose methods of vLLM's are called.
            index: of the layer.
            query: [tokens, query heads, D] of the whole batch.
            out: like ``query``, written at the rows.
        """
        vllms = CPUAttentionBackendImpl
        # It is read to its end, and what another sequence has left there may be no number.
        self.scratch[self.ends] = 0
        for pages, tokens, slots in zip(self.pages, self.tokens, self.slots, strict=True):
            entries = kv.pages.index_select(0, pages[index].flatten())
            entries = entries.view(len(pages[index]), -1, entries.shape[2])[:, :tokens]
            keys, values = entries.transpose(0, 1).chunk(2, dim=2)  # [tokens, heads, D]
            vllms.do_kv_cache_update(impl, layer, keys, values, self.scratch, slots)
        mine = query[self.queries]
        if isinstance(self.queries, slice):
            into = out[self.queries]
            vllms.forward(impl, layer, mine, mine, mine, self.scratch, self.metadata, into)
            return
        result = torch.empty_like(mine)
        vllms.forward(impl, layer, mine, mine, mine, self.scratch, self.metadata, result)
        out[self.queries] = result


class ExactPrefillBuilder:
    """Makes them, for the layers of one group.

    Args:
        kv_cache_spec, layer_names, vllm_config, device: as for any attention metadata builder.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        self._builder: CPUAttentionMetadataBuilder | None = None
        if kv_cache_spec.head_size in CPUAttentionBackend.get_supported_head_sizes():
            spec = replace(kv_cache_spec, block_size=SCRATCH_BLOCK)
            self._builder = CPUAttentionMetadataBuilder(spec, layer_names, vllm_config, device)

    def takes(self, row: PagedRow) -> bool:
        """Whether a row is for vLLM's kernel, and the kernel knows the heads' size."""
        return row.compacted is None and self._builder is not None

    def build(
        self, rows: Sequence[PagedRow], kv: PagedKV, common: CommonAttentionMetadata
    ) -> list[ExactPrefill]:
        """Of some rows of a batch, in their order, each of which it takes; one after the other."""
        heads, width = kv.num_kv_heads, kv.pages.shape[2]
        block_bytes = heads * SCRATCH_BLOCK * width * kv.pages.itemsize
        groups: list[list[PagedRow]] = []
        blocks: list[int] = []
        for row in rows:
            more = ceil_div(row.live_tokens, SCRATCH_BLOCK)
            if groups and (blocks[-1] + more) * block_bytes <= SCRATCH_BYTES:
                groups[-1].append(row)
                blocks[-1] += more
            else:
                groups.append([row])
                blocks.append(more)
        scratch = kv.pages.new_empty(max(blocks), heads, SCRATCH_BLOCK, width)
        return [self._of(group, kv, common, scratch) for group in groups]

    def _of(
        self,
        rows: Sequence[PagedRow],
        kv: PagedKV,
        common: CommonAttentionMetadata,
        scratch: torch.Tensor,
    ) -> ExactPrefill:
        assert self._builder is not None
        counts = torch.tensor([ceil_div(row.live_tokens, SCRATCH_BLOCK) for row in rows])
        begins = counts.cumsum(0) - counts
        table = begins[:, None] + torch.arange(int(counts.max()))
        new = torch.tensor([row.new for row in rows])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]).int()
        lengths = torch.tensor([row.live_tokens for row in rows], dtype=torch.int32)
        batch = replace(
            common,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            num_reqs=len(rows),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(new.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table.int(),
            slot_mapping=torch.empty(0, dtype=torch.int64),  # written by other means
        )
        first, last = rows[0].first, rows[-1].last
        together = last - first == int(starts[-1])
        return ExactPrefill(
            queries=slice(first, last)
            if together
            else torch.cat([torch.arange(row.first, row.last) for row in rows]),
            pages=[
                kv.block_pages(row.blocks)[:, : row.live_pages(kv.page_size)].unflatten(
                    0, (-1, kv.num_kv_heads)
                )
                for row in rows
            ],
            tokens=lengths.tolist(),
            slots=[
                torch.arange(row.live_tokens) + begin * SCRATCH_BLOCK
                for row, begin in zip(rows, begins.tolist(), strict=True)
            ],
            ends=(begins + counts - 1).tolist(),
            scratch=scratch,
            metadata=self._builder.build(0, batch),
        )
