"""Attention over partly compacted sequences on the CPU.

vLLM symbols touched: ``v1.attention.backends.cpu_attn`` (subclassed), registered as the ``CUSTOM``
backend. vLLM's own CPU kernel packs keys in a tile order of its own, which neither the fit nor a
per-key bias can share, so the cache is written and read here; prefill chunks of exact sequences are
that kernel's all the same (prefill_cpu.py).

A row attends to ``[protected prefix | live tail | compacted slots with bias]``. Keys keep the
rotation of their original positions, so order and distance inside the cache do not matter;
causality only concerns the newest tokens, which are always at the end of the live ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_am.compaction.attend_pages import PagedRow, PagedRows, attend_pages, group_rows
from vllm_am.engine.worker.plain_layer import PlainLayer
from vllm_am.engine.worker.prefill_cpu import ExactPrefill, ExactPrefillBuilder
from vllm_am.engine.worker.state import CompactedSequence, WorkerState, worker_state
from vllm_am.kernels.attend_pages import PageAttention
from vllm_am.kernels.cpu_library import load as load_kernel

logger = init_logger("vllm.kv_compaction")


@dataclass(frozen=True)
class CompactionMetadata:
    """Attention metadata of one batch, shared by all layers."""

    pages: PageAttention | None
    """The rows that our kernel attends to."""
    prefill: list[ExactPrefill]
    """Those that vLLM's does."""
    groups: list[PagedRows]
    """The others."""
    state: WorkerState
    capture_rows: torch.Tensor
    """int64 [n]: query rows of the batch that are kept as reference queries."""
    capture_slots: torch.Tensor
    """int64 [n]: their slots in the query pool."""


class CompactionMetadataBuilder(AttentionMetadataBuilder[CompactionMetadata]):
    """Leaves compacted blocks out of each row's block table."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size: int = kv_cache_spec.block_size
        self.query_heads = vllm_config.model_config.get_num_attention_heads(
            vllm_config.parallel_config
        )
        self.exact_prefill = ExactPrefillBuilder(kv_cache_spec, layer_names, vllm_config, device)
        kernel = load_kernel()  # now, and not while the first request waits
        if kernel.code is not None:
            logger.info_once("KV compaction: attention by the compiled kernel (%s)", kernel.says)
        else:
            logger.warning_once(
                "KV compaction: attention by plain torch, several times slower than the compiled "
                "kernel (%s)",
                kernel.says,
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CompactionMetadata:
        common = common_attn_metadata
        state = worker_state(self.vllm_config)
        assert state is not None  # it came with the cache
        starts: list[int] = common.query_start_loc_cpu.tolist()
        lengths: list[int] = common.seq_lens.tolist()
        ids = state.row_request_ids(common.req_idx, common.num_reqs)
        few: list[PagedRow] = []
        exact: list[PagedRow] = []
        others: list[PagedRow] = []
        captured, slots = [], []
        for index, request_id in enumerate(ids):
            first, last = starts[index], starts[index + 1]
            if last <= first:
                continue
            sequence = state.sequences.get(request_id or "")
            table = common.block_table_tensor[index]
            row = self._row(first, last, table, lengths[index], sequence)
            if PageAttention.takes(row, state.kv):
                few.append(row)
            else:
                (exact if self.exact_prefill.takes(row) else others).append(row)
            if state.step and (sample := state.step.samples.get(request_id or "")):
                captured.append(torch.from_numpy(sample.offsets) + first)
                slots.append(torch.from_numpy(sample.slots))
        empty = torch.empty(0, dtype=torch.int64)
        return CompactionMetadata(
            pages=PageAttention(few, state.kv, self.query_heads) if few else None,
            prefill=self.exact_prefill.build(exact, state.kv, common) if exact else [],
            groups=list(group_rows(others, state.kv)),
            state=state,
            capture_rows=torch.cat([*captured, empty]),
            capture_slots=torch.cat([*slots, empty]),
        )

    def _row(
        self,
        first: int,
        last: int,
        table: torch.Tensor,
        length: int,
        sequence: CompactedSequence | None,
    ) -> PagedRow:
        blocks = table[: -(-length // self.block_size)].long()
        if sequence is None:
            return PagedRow(first, last, blocks, length, None)
        gap = slice(sequence.start // self.block_size, sequence.end // self.block_size)
        live = torch.cat([blocks[: gap.start], blocks[gap.stop :]])
        length -= sequence.end - sequence.start
        return PagedRow(first, last, live, length, sequence.padded)


class CompactionAttentionImpl(PlainLayer, CPUAttentionBackendImpl):
    """Writes the cache head-major, keeps sampled queries, attends with a per-slot bias."""

    sinks: torch.Tensor | None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store ``key`` and ``value`` ``[tokens, H, D]``; slot -1 is padding."""
        tokens = min(slot_mapping.shape[0], key.shape[0])
        slots, key, value = slot_mapping[:tokens], key[:tokens], value[:tokens]
        if bool((slots < 0).any()):
            real = slots >= 0
            slots, key, value = slots[real], key[real], value[real]
        block_size, width = kv_cache.shape[2], key.shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        kv_cache[blocks, :, offsets, :width] = key.to(kv_cache.dtype)
        kv_cache[blocks, :, offsets, width:] = value.to(kv_cache.dtype)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of ``query`` ``[tokens, query heads, D]`` over the paged cache."""
        if attn_metadata is None:  # profiling run
            return output
        metadata: CompactionMetadata = attn_metadata
        heads, dim = self.num_heads, self.head_size
        query = query.view(-1, heads, dim)
        out = output.view(-1, heads, dim)
        state = metadata.state
        if len(metadata.capture_slots):
            state.queries[layer.layer_name][metadata.capture_slots] = query[metadata.capture_rows]
            state.fit_on_policy(layer.layer_name)
        index = state.layer_indices[layer.layer_name]
        # Once: they are a part of the model, which does not change.
        if self.sinks is not None and self.sinks.dtype != torch.float32:
            self.sinks = self.sinks.float().contiguous()
        if metadata.pages is not None:
            metadata.pages(query, out, index, scale=self.scale, sinks=self.sinks)
        for prefill in metadata.prefill:
            prefill(self, layer, state.kv, index, query, out)
        for rows in metadata.groups:
            out[rows.queries] = attend_pages(
                query[rows.queries], state.kv, rows, index, scale=self.scale, sinks=self.sinks
            )
        return output


class CompactionCPUBackend(CPUAttentionBackend):
    """The CPU backend with compaction."""

    forward_includes_kv_cache_update = False
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        # A member of vLLM's enum of backends: the one it reserves for plugins.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CompactionAttentionImpl]:
        return CompactionAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompactionMetadataBuilder]:
        return CompactionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        # vLLM's own kernel needs multiples of 32, ours takes pages of any size.
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Head-major: the slots of one head in a block are contiguous, a page of its own.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False
