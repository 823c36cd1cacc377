"""Our classes by name, and where vLLM is told of them: the one file that knows all three rooms.

vLLM takes the scheduler and the worker by their names in the configuration, the attention backend
from its registry of names, the block manager from its registry of cache specs. So no room needs to
import another, and a process imports what runs in it.

vLLM symbols touched: ``v1.attention.backends.registry.register_backend``, member ``CUSTOM``;
``platforms.cpu.CpuPlatform.get_attn_backend_cls`` (wrapped, see :func:`install_backend`);
``v1.kv_cache_spec_registry.KVCacheSpecRegistry.register`` and
``v1.core.single_type_kv_cache_manager.register_all_kvcache_specs`` (called).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

#: By whether scheduling is asynchronous.
SCHEDULERS = {
    False: "vllm_am.engine.scheduler.scheduler.CompactionScheduler",
    True: "vllm_am.engine.scheduler.scheduler.CompactionAsyncScheduler",
}


@dataclass(frozen=True)
class PlatformClasses:
    """Our classes for one kind of vLLM worker."""

    worker: str
    attention_backend: str


#: By the worker class that vLLM resolved for the platform.
PLATFORM_CLASSES = {
    "vllm.v1.worker.cpu_worker.CPUWorker": PlatformClasses(
        worker="vllm_am.engine.worker.worker_cpu.CompactionCPUWorker",
        attention_backend="vllm_am.engine.worker.attention_cpu.CompactionCPUBackend",
    ),
    "vllm.v1.worker.gpu_worker.Worker": PlatformClasses(
        worker="vllm_am.engine.worker.worker_cuda.CompactionCUDAWorker",
        attention_backend="vllm_am.engine.worker.attention_cuda.CompactionCUDABackend",
    ),
}


def platform_classes() -> PlatformClasses:
    """Our classes for the platform of this process."""
    worker = "gpu_worker.Worker" if current_platform.is_cuda() else "cpu_worker.CPUWorker"
    return PLATFORM_CLASSES[f"vllm.v1.worker.{worker}"]


def install_backend(attention_backend: str) -> None:
    """Register our attention backend in this process, and let the CPU platform select it.

    vLLM symbol touched: ``platforms.cpu.CpuPlatform.get_attn_backend_cls``, which ignores the
    selected backend; wrapped to honour the plugin backend. Called in the front end, and in each
    worker when our worker class is imported. It can go when the CPU platform honours
    ``--attention-backend``, as the CUDA platform does.
    """
    register_backend(AttentionBackendEnum.CUSTOM, attention_backend)
    platform = type(current_platform)
    if not current_platform.is_cpu() or hasattr(platform, "_kv_compaction_installed"):
        return
    platform._kv_compaction_installed = True
    original = platform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if selected_backend == AttentionBackendEnum.CUSTOM and not attn_selector_config.use_mla:
            path: str = AttentionBackendEnum.CUSTOM.get_path()
            return path
        stock: str = original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        return stock

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def register_cache_spec(spec: type) -> None:
    """Make vLLM build our block manager for ``spec``, in whichever process this runs."""
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST, KVCacheSpecRegistry

    from vllm_am.engine.scheduler.blocks import CompactingManager

    if spec in _REGISTRY_KVCACHESPEC_LIST:
        return
    if not _REGISTRY_KVCACHESPEC_LIST:
        # vLLM fills an empty registry only: ours alone in it would hide all built-in specs.
        register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(spec, CompactingManager, uniform_type_base_spec=FullAttentionSpec)
