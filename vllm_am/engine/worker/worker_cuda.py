"""The GPU worker with compaction."""

from __future__ import annotations

from itertools import chain
from typing import Any

from vllm.v1.worker.block_table import get_block_table_width
from vllm.v1.worker.gpu_worker import Worker

from vllm_am.engine.classes import PLATFORM_CLASSES, install_backend
from vllm_am.engine.worker.attention_cuda import CompactionMetadataBuilder, step_buffers
from vllm_am.engine.worker.worker import CompactionWorkerMixin

# In a worker process nobody else does this before the model's layers ask for their backend.
install_backend(PLATFORM_CLASSES["vllm.v1.worker.gpu_worker.Worker"].attention_backend)


class CompactionCUDAWorker(CompactionWorkerMixin, Worker):
    """vLLM's GPU worker with compaction."""

    def step_buffer_bytes(self, spec: Any) -> int:
        """By making the buffers and letting them go: they are allocated with the KV cache."""
        model = self.vllm_config.model_config
        blocks = spec.max_num_blocks_per_req(self.vllm_config, model.max_model_len)
        heads = model.get_num_attention_heads(self.vllm_config.parallel_config)
        width = get_block_table_width(blocks, spec.block_size)
        buffers = step_buffers(spec, heads, width, self.vllm_config, self.device)
        return sum(buffer.nbytes for buffer in buffers)

    def compile_or_warm_up_model(self) -> Any:
        """Compile our kernels too, before vLLM captures CUDA graphs."""
        if self._compaction is not None:
            self._compaction.warm_up()
            for group in chain.from_iterable(self.model_runner.attn_groups):
                builder = group.get_metadata_builder()
                if isinstance(builder, CompactionMetadataBuilder):
                    builder.warm_up(self._compaction)
        return super().compile_or_warm_up_model()
