"""Attention over partly compacted sequences on the CPU: the plain-torch backend.

vLLM symbols touched: ``v1.attention.backends.cpu_attn`` (subclassed), registered as the ``CUSTOM``
backend. vLLM's own CPU kernel packs keys in a tile order of its own, which neither the fit nor a
per-key bias can share, so reads and writes of the cache are done here.

A row attends to ``[protected prefix | compacted slots with bias | live tail]``. Keys keep the
rotation of their original positions, so order and distance inside the cache do not matter;
causality only concerns the newest tokens, which are always at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_am.compaction.pages import PagedKV
from vllm_am.engine.capabilities import PlainLayer
from vllm_am.engine.worker_state import CompactedSequence, WorkerState, worker_state

#: Query rows attended at once: bounds the mask and score matrices of long prefill chunks.
QUERY_CHUNK = 1024


@dataclass(frozen=True)
class Row:
    """One sequence of the batch."""

    first: int
    """Its query rows are [first, last) of the batch."""
    last: int
    live_blocks: torch.Tensor
    """int64: blocks of the protected prefix and of the live tail."""
    live_tokens: int
    compacted: CompactedSequence | None
    """What stands for the tokens that are neither, or None."""


@dataclass(frozen=True)
class CompactionMetadata:
    """Attention metadata of one batch, shared by all layers."""

    rows: list[Row]
    state: WorkerState | None
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

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CompactionMetadata:
        common = common_attn_metadata
        state = worker_state(self.vllm_config)
        starts: list[int] = common.query_start_loc_cpu.tolist()
        lengths: list[int] = common.seq_lens.tolist()
        ids: list[str | None] = [None] * common.num_reqs
        if state is not None:
            ids = state.row_request_ids(common.req_idx, common.num_reqs)
        rows, captured, slots = [], [], []
        for index, request_id in enumerate(ids):
            first, last = starts[index], starts[index + 1]
            if last <= first:
                continue
            sequence = state.sequences.get(request_id) if state and request_id else None
            rows.append(
                self._row(first, last, common.block_table_tensor[index], lengths[index], sequence)
            )
            if state and state.step and (sample := state.step.samples.get(request_id or "")):
                captured.append(torch.from_numpy(sample.offsets) + first)
                slots.append(torch.from_numpy(sample.slots))
        empty = torch.empty(0, dtype=torch.int64)
        return CompactionMetadata(
            rows, state, torch.cat([*captured, empty]), torch.cat([*slots, empty])
        )

    def _row(
        self,
        first: int,
        last: int,
        table: torch.Tensor,
        length: int,
        sequence: CompactedSequence | None,
    ) -> Row:
        blocks = table[: -(-length // self.block_size)].long()
        if sequence is None:
            return Row(first, last, blocks, length, None)
        gap = slice(sequence.start // self.block_size, sequence.end // self.block_size)
        live = torch.cat([blocks[: gap.start], blocks[gap.stop :]])
        return Row(first, last, live, length - (sequence.end - sequence.start), sequence)


class CompactionAttentionImpl(PlainLayer, CPUAttentionBackendImpl):
    """Writes the cache head-major, keeps sampled queries, attends with a per-slot bias."""

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
        slots = slot_mapping[:tokens]
        real = slots >= 0
        slots = slots[real]
        entries = torch.cat([key[:tokens][real], value[:tokens][real]], dim=-1)
        block_size = kv_cache.shape[2]
        kv_cache[slots // block_size, :, slots % block_size] = entries.to(kv_cache.dtype)

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
        if state is not None and len(metadata.capture_slots):
            state.queries[layer.layer_name][metadata.capture_slots] = query[metadata.capture_rows]
            state.fit_on_policy(layer.layer_name)
        for row in metadata.rows:
            compacted = None
            if row.compacted is not None and state is not None:
                index = state.layer_indices[layer.layer_name]
                compacted = compacted_slots(state.kv, row.compacted.padded, index)
            out[row.first : row.last] = attend_row(
                query[row.first : row.last], kv_cache, row, compacted, self.scale
            )
        return output


def compacted_slots(
    kv: PagedKV, padded: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, values and bias of a sequence's compacted slots in one layer.

    Args:
        padded: int64 [heads, pages], -1 where a head has no more pages.

    Returns:
        ``[H, slots, 2 * D]`` and float32 ``[H, slots]``, padded with bias -inf to the layer's
        longest head.
    """
    pages = padded[layer * kv.num_kv_heads : (layer + 1) * kv.num_kv_heads]
    pages = pages[:, : int((pages >= 0).sum(dim=1).max())]
    some = pages.clamp(min=0)
    bias = kv.bias[some].masked_fill((pages < 0).unsqueeze(2), float("-inf"))
    return kv.pages[some].flatten(1, 2), bias.flatten(1)


def attend_row(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    row: Row,
    compacted: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
) -> torch.Tensor:
    """Attention of one sequence's newest tokens over everything it holds.

    Args:
        query: ``[n, query heads, D]``, the last ``n`` tokens of the sequence.
        kv_cache: ``[num_blocks, H, block_size, 2 * D]``.
        row: where the sequence's live keys and values are.
        compacted: see :func:`compacted_slots`.
        scale: factor on the scores; the bias is added after it (algorithm, §1.1).

    Returns:
        ``[n, query heads, D]`` in the dtype of ``query``.
    """
    kv_heads, dim = kv_cache.shape[1], kv_cache.shape[3] // 2
    new = query.shape[0]
    live = kv_cache[row.live_blocks].transpose(0, 1).flatten(1, 2)[:, : row.live_tokens]
    held, held_bias = live, None
    if compacted is not None:
        entries, held_bias = compacted
        held = torch.cat([entries, live], dim=1)
    # The bias was fitted in float32, and SDPA wants one dtype for mask and operands.
    dtype = query.dtype if held_bias is None else torch.float32
    # One SDPA batch entry per KV head, its group of query heads as SDPA's heads.
    grouped = query.view(new, kv_heads, -1, dim).permute(1, 2, 0, 3).to(dtype)  # [H, g, n, D]
    group = grouped.shape[1]
    keys = held[:, None, :, :dim].expand(-1, group, -1, -1).to(dtype)
    values = held[:, None, :, dim:].expand(-1, group, -1, -1).to(dtype)
    parts = []
    for first in range(0, new, QUERY_CHUNK):
        chunk = grouped[:, :, first : first + QUERY_CHUNK]
        mask = _mask(chunk.shape[2], first, new, row.live_tokens, held_bias, dtype)
        parts.append(F.scaled_dot_product_attention(chunk, keys, values, mask, scale=scale))
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3).reshape(query.shape).to(query.dtype)


def _mask(
    rows: int,
    first: int,
    new: int,
    live: int,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """Bias of the compacted slots and causality among the live tokens; None where neither is due.

    Row ``i`` of the newest ``new`` tokens sees the first ``live - new + i + 1`` live tokens and
    every compacted slot. Returns ``[H or 1, 1, rows, slots + live]``.
    """
    if bias is None and new == 1:
        return None
    visible = torch.arange(first, first + rows)[:, None] + (live - new) >= torch.arange(live)
    causal = torch.zeros(rows, live, dtype=dtype).masked_fill_(~visible, float("-inf"))
    if bias is None:
        return causal[None, None]
    heads, slots = bias.shape
    return torch.cat(
        [
            bias[:, None, None].expand(heads, 1, rows, slots).to(dtype),
            causal[None, None].expand(heads, 1, rows, live),
        ],
        dim=-1,
    )


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
