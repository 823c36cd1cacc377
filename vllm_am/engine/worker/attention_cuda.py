"""Attention over partly compacted sequences on NVIDIA GPUs: FlashAttention, and a kernel of ours.

vLLM symbols touched: ``v1.attention.backends.flash_attn`` (backend, metadata builder and impl are
subclassed), registered as the ``CUSTOM`` backend. Writes to the cache are FlashAttention's own.

FlashAttention attends to the live part of each sequence ``[protected prefix | live tail]``, through
a block table without the compacted blocks; its causal mask is aligned to the end, so it stays
right. It returns the log-sum-exp, with which ``attend_compacted`` adds the compacted slots in place
(``kernels/attention.py``). The builder's ``build`` runs before every step and every replay of a
full CUDA graph: whatever depends on the step is done there, into buffers that graphs read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_am.engine.capabilities import GPU_HEAD_SIZES, UnsupportedByCompaction
from vllm_am.engine.worker.live_batch import HostRows, LiveBatch
from vllm_am.engine.worker.plain_layer import PlainLayer
from vllm_am.engine.worker.state import WorkerState, worker_state
from vllm_am.kernels.attention import (
    CompactedAttentionWorkspace,
    QueryCapture,
    RowTables,
    attend_compacted,
)


@dataclass(frozen=True)
class CompactedRows:
    """What the forward pass needs besides FlashAttention's metadata."""

    state: WorkerState
    rows: RowTables
    capture_slots: torch.Tensor
    """int64 [tokens]: slot of the query pool, or -1."""
    workspace: CompactedAttentionWorkspace


@dataclass
class CompactionMetadata(FlashAttentionMetadata):
    """FlashAttention's metadata of the live part."""

    compacted: CompactedRows | None = None
    """None: nothing is compacted and no query is kept, all is FlashAttention's alone."""


def step_buffers(
    spec: Any, num_query_heads: int, table_width: int, vllm_config: VllmConfig, device: torch.device
) -> tuple[LiveBatch, CompactedAttentionWorkspace]:
    """The buffers of one metadata builder, large enough for every batch and every graph."""
    rows = vllm_config.scheduler_config.max_num_seqs
    tokens = max(
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.compilation_config.max_cudagraph_capture_size or 0,
    )
    return (
        LiveBatch(rows, tokens, table_width, spec.block_size, device),
        CompactedAttentionWorkspace(
            rows,
            spec.num_kv_heads,
            num_query_heads // spec.num_kv_heads,
            spec.head_size,
            device,
            max_query_len=max_decode_query_len(vllm_config),
        ),
    )


class CompactionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Shows FlashAttention the live part of each sequence."""

    # Decode is replayed from full graphs, prefill from piecewise ones, in which the attention runs
    # eagerly: its grid may then depend on the batch. FlashAttention 3 would report ALWAYS.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # It would put vLLM's own block table in the place of the live one.
    supports_update_block_table = False
    requires_block_table_width = True

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        block_table_width: int,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False  # it would not shorten anything
        self.live, self.workspace = step_buffers(
            kv_cache_spec, self.num_heads_q, block_table_width, vllm_config, device
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CompactionMetadata:
        common = common_attn_metadata
        state = worker_state(self.vllm_config)
        compacted = None
        if state is not None:
            host = HostRows.of(state, common, self.block_size)
            # A full graph reads the live tables whatever the batch is; nobody tells the builder
            # whether this batch will be one, only that large ones never are.
            graph = self.use_full_cuda_graph and (
                common.num_actual_tokens <= (self.max_cudagraph_size or 0)
            )
            if graph or host.compacted or host.captured:
                self.live.upload(host)
                compacted = CompactedRows(
                    state,
                    self.live.rows(common),
                    self.live.capture_slots[: common.num_actual_tokens],
                    self.workspace,
                )
            if graph or host.compacted:
                block_table, seq_lens = self.live.shorten(common)
                common = common.replace(
                    block_table_tensor=block_table,
                    seq_lens=seq_lens,
                    max_seq_len=host.longest(common, self.block_size),
                )
        metadata = super().build(common_prefix_len, common, fast_build)
        return CompactionMetadata(**vars(metadata), compacted=compacted)

    def warm_up(self, state: WorkerState) -> None:
        """Compile the kernels that serving will need, before graphs are captured.

        Nothing is compacted at start-up, so vLLM's own warm-up would leave most of them to the
        first compaction, in the middle of serving.
        """
        self.live.warm_up()
        name, pool = next(iter(state.queries.items()))
        device, (_, heads, dim) = pool.device, pool.shape
        for tokens in range(1, self.workspace.max_query_len + 2):  # the last: as in prefill
            query = torch.zeros(tokens, heads, dim, dtype=pool.dtype, device=device)
            attend_compacted(
                query,
                torch.zeros_like(query),
                torch.zeros(heads, tokens, dtype=torch.float32, device=device),
                state.kv,
                state.layer_indices[name],
                RowTables(
                    torch.tensor([0, tokens], dtype=torch.int32, device=device),
                    torch.zeros(1, dtype=torch.int64, device=device),
                    active=self.live.active,
                ),
                self.workspace,
                scale=state.layers[name].impl.scale,
                max_query_len=tokens,
                capture=QueryCapture(torch.full((tokens,), -1, device=device), pool),
            )


class CompactionAttentionImpl(PlainLayer, FlashAttentionImpl):
    """FlashAttention over the live part, then the compacted slots added in place."""

    supports_dcp = False
    vllm_flash_attn_version: int | None
    fa4_hd256: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.fa4_hd256:
            # Blackwell's kernel for this head size wants block tables of an exact width, which
            # the live ones do not have.
            self.vllm_flash_attn_version = 2
            self.fa4_hd256 = False
        if self.sinks is not None and self.vllm_flash_attn_version != 3:
            raise UnsupportedByCompaction(
                "--kv-compaction does not support attention sinks with FlashAttention "
                f"{self.vllm_flash_attn_version} yet: serve this model on a Hopper GPU, or drop "
                "--kv-compaction"
            )

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
        if attn_metadata is None or attn_metadata.compacted is None:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization")
        metadata: CompactionMetadata = attn_metadata
        compacted: CompactedRows = attn_metadata.compacted
        state, tokens = compacted.state, metadata.num_actual_tokens
        query, part = query[:tokens], output[:tokens]
        # [B, H, N, 2 * D] -> keys and values, each [B, N, H, D]
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        _, lse = flash_attn.flash_attn_varlen_func(
            q=query,
            k=canonicalize_singleton_dim_strides(keys),
            v=canonicalize_singleton_dim_strides(values),
            out=part,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            seqused_k=metadata.seq_lens,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            block_table=metadata.block_table,
            return_softmax_lse=True,
            scheduler_metadata=metadata.scheduler_metadata,
            num_splits=metadata.max_num_splits,
            fa_version=self.vllm_flash_attn_version,
            s_aux=self.sinks,  # in the log-sum-exp too, so that it is counted once
        )
        if state.fits_on_policy:  # never in a graph: a reference pass is no decode
            _keep_queries(compacted, query, layer.layer_name)
            state.fit_on_policy(layer.layer_name)
        attend_compacted(
            query,
            part,
            lse,
            state.kv,
            state.layer_indices[layer.layer_name],
            compacted.rows,
            compacted.workspace,
            scale=self.scale,
            max_query_len=metadata.max_query_len,
            capture=QueryCapture(compacted.capture_slots, state.queries[layer.layer_name]),
        )
        return output


def _keep_queries(compacted: CompactedRows, query: torch.Tensor, layer_name: str) -> None:
    """Into the query pool ahead of ``attend_compacted``, which does it along the way."""
    slots = compacted.capture_slots
    kept = slots >= 0
    compacted.state.queries[layer_name][slots[kept]] = query[kept]


class CompactionCUDABackend(FlashAttentionBackend):
    """The FlashAttention backend with compaction.

    vLLM checks a selected backend with ``validate_configuration``, which asks the methods below.
    """

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

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
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        # Never a fixed size: vLLM would split blocks into smaller ones of that size, and a page
        # is a head's share of a whole block.
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return default_block_size

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in GPU_HEAD_SIZES

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        # How a compacted head is split among programs depends on the size of the batch.
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # Which query is kept is decided by its place in the batch, as the host knows it.
        return False
