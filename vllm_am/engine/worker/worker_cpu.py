"""The CPU worker with compaction."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_am.engine.classes import PLATFORM_CLASSES, install_backend
from vllm_am.engine.worker.worker import CompactionWorkerMixin

# In a worker process nobody else does this before the model's layers ask for their backend.
install_backend(PLATFORM_CLASSES["vllm.v1.worker.cpu_worker.CPUWorker"].attention_backend)


class CompactionCPUWorker(CompactionWorkerMixin, CPUWorker):
    """vLLM's CPU worker with compaction."""
