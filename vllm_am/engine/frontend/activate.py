"""Turning compaction on for one engine: check, choose vLLM's classes, say so.

vLLM symbols touched: ``engine.arg_utils.EngineArgs.create_engine_config`` is wrapped; with the
option absent it is called and nothing else happens. Why: it is the one place where every way to
start an engine meets a finished ``VllmConfig``. It can go when vLLM's config classes accept
plugin sections with a validation hook.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.usage.usage_lib import UsageContext
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_am.config import CONFIG_KEY, CompactionConfig, CompactionConfigError
from vllm_am.engine import capabilities, versions
from vllm_am.engine.classes import (
    PLATFORM_CLASSES,
    SCHEDULERS,
    install_backend,
    platform_classes,
)
from vllm_am.engine.families import is_proven
from vllm_am.engine.frontend import marked_prefix, metrics, request_params
from vllm_am.engine.frontend.reference_prompts import encode_reference_prompts
from vllm_am.engine.identity import checked_file
from vllm_am.engine.layers import FULL, full_layers, settle_windows
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.prefix_file import PrefixFileError
from vllm_am.engine.rotation import queries_in_effect

logger = init_logger("vllm.kv_compaction")

#: Share of the ratio asked for, below which the rounding to whole blocks is worth a warning.
WORTH_SAYING = 0.8
#: Sizes of blocks that could be advised instead.
BLOCK_SIZES = (16, 32, 64)


def activate(vllm_config: VllmConfig) -> None:
    """Choose our scheduler and worker on a finished configuration.

    Raises:
        UnsupportedByCompaction, CompactionConfigError: naming the flag and the fix.
    """
    settle_windows(vllm_config)
    capabilities.check(vllm_config)
    versions.settle_block_size(vllm_config)
    worker_cls = vllm_config.parallel_config.worker_cls
    classes = PLATFORM_CLASSES.get(worker_cls)
    if classes is None:
        raise capabilities.UnsupportedByCompaction(
            f"--kv-compaction does not support --worker-cls {worker_cls} yet: drop it"
        )
    encode_reference_prompts(vllm_config)
    limits = EngineLimits.from_vllm_config(vllm_config)
    check_preload(vllm_config, limits)
    # A plain scheduler under async scheduling would be wrong, and vLLM does not check.
    async_scheduling = bool(vllm_config.scheduler_config.async_scheduling)
    vllm_config.scheduler_config.scheduler_cls = SCHEDULERS[async_scheduling]
    vllm_config.parallel_config.worker_cls = classes.worker
    install_backend(classes.attention_backend)
    if limits.window_layers:  # theirs is the one that vLLM chooses
        attention = vllm_config.attention_config
        attention.backend = None
        attention.backend_per_kind = {FULL: AttentionBackendEnum.CUSTOM}
    metrics.install()
    request_params.install()
    announce(vllm_config, limits)


def check_preload(vllm_config: VllmConfig, limits: EngineLimits) -> None:
    """Files of compacted prefixes are this model's, before anything is loaded.

    Raises:
        CompactionConfigError: naming the file, and what of it is wrong.
    """
    for path in limits.config.preload:
        try:
            file = checked_file(Path(path), vllm_config, limits, any_options=False)
            for name in file.header.names:
                file.read_heads(name, file.header.heads)
        except PrefixFileError as error:
            raise CompactionConfigError(f"--kv-compaction-preload: {error}") from None
        if file.header.ratio != limits.config.ratio:
            logger.warning(
                "KV compaction: %s was compacted to a ratio of %.4g, and --kv-compaction-ratio is "
                "%.4g: only requests with that kv_compaction_ratio begin on it",
                path,
                file.header.ratio,
                limits.config.ratio,
            )


def announce(vllm_config: VllmConfig, limits: EngineLimits) -> None:
    """The startup line: what is on, what becomes of the ratio; a warning where that is little."""
    model = vllm_config.model_config
    ratio = limits.config.ratio
    least, most = limits.footprint.reached(ratio)
    logger.info(
        "KV compaction is on: attention matching (%s), keeps %.4g of the KV (%.1fx), threshold %s, "
        "queries %s, %s layers x %d KV heads, last %d and first %d tokens stay exact; in whole "
        "blocks of %d compacted spans shrink by %.1fx to %.1fx (the custom scheduler class "
        "that vLLM warns of is this plugin's)",
        limits.config.method,
        ratio,
        1 / ratio,
        limits.threshold,
        _queries(limits.config, model.hf_text_config),
        _layers(model.hf_text_config),
        model.get_total_num_kv_heads(),
        limits.config.recent_tokens,
        limits.protected_tokens,
        limits.block_size,
        least,
        most,
    )
    if not is_proven(model.hf_config):
        logger.warning(
            "KV compaction: models of type %s are not among those it is proven on "
            "(`vllm-am models` lists them)",
            model.hf_config.model_type,
        )
    if ratio == 1:
        logger.warning(
            "KV compaction: --kv-compaction-ratio 1 keeps everything, so only requests that bring "
            "a kv_compaction_ratio of their own are compacted"
        )
    if least >= WORTH_SAYING / ratio:
        return
    # Where layers have a state, a block has to hold one.
    sizes = () if limits.state_layers else BLOCK_SIZES
    smaller = [size for size in sizes if size < limits.block_size]
    gives = {size: replace(limits, block_size=size).footprint.reached(ratio)[0] for size in smaller}
    best = max(gives, key=lambda size: (min(gives[size], WORTH_SAYING / ratio), size), default=None)
    logger.warning(
        "KV compaction: %.1fx is asked for, and the shortest spans shrink by %.1fx only, as they "
        "are held in whole blocks of %d tokens: %sraise --kv-compaction-threshold",
        1 / ratio,
        least,
        limits.block_size,
        f"--block-size {best} gives {gives[best]:.1f}x; or " if best else "",
    )


def _layers(text_config: Any) -> str:
    """How many are compacted, and of how many where that is not all."""
    compacted, every = len(full_layers(text_config)), text_config.num_hidden_layers
    return f"{compacted}" if compacted == every else f"{compacted} of {every}"


def _queries(config: CompactionConfig, text_config: Any) -> str:
    """What the reference queries are; a source that is what it says on other models only is named.

    Not an error: it is the default, and the queries are the same, where they were computed.
    """
    said = queries_in_effect(config, text_config)
    if "context-rotated" in config.query_fractions and "context-rotated" not in said:
        said += " (the model has no rotary embedding by which context-rotated could move them)"
    return said


def install() -> None:
    """Wrap ``EngineArgs.create_engine_config``."""
    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        options = (self.additional_config or {}).get(CONFIG_KEY)
        if options is None:
            return original(self, *args, **kwargs)
        versions.check()
        config = CompactionConfig.from_dict(options)
        self.additional_config = {**self.additional_config, CONFIG_KEY: config.to_dict()}
        if self.attention_backend not in (None, "CUSTOM", AttentionBackendEnum.CUSTOM):
            raise capabilities.UnsupportedByCompaction(
                f"--attention-backend {self.attention_backend} cannot read compacted sequences: "
                "drop it, --kv-compaction brings its own attention backend"
            )
        capabilities.check_platform()
        self.attention_backend = AttentionBackendEnum.CUSTOM
        install_backend(platform_classes().attention_backend)
        vllm_config = original(self, *args, **kwargs)
        activate(vllm_config)
        if UsageContext.OPENAI_API_SERVER in (*args, *kwargs.values()):
            request_params.install_in_api_server()
            marked_prefix.install()
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config
