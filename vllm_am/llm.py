"""Offline inference with compaction in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm

from vllm_am.config import CONFIG_KEY, CompactionConfig


class LLM(vllm.LLM):
    """``vllm.LLM`` with one more argument.

    Args:
        kv_compaction: options of :class:`vllm_am.CompactionConfig`, e.g. ``{"ratio": 0.1}``; an
            empty dict turns compaction on with all defaults, None leaves it off.

    The same without this class: ``vllm.LLM(additional_config={"kv_compaction": {...}})``.
    """

    def __init__(
        self, *args: Any, kv_compaction: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if kv_compaction is not None:
            options = CompactionConfig.from_dict(kv_compaction).to_dict()
            kwargs["additional_config"] = {
                **(kwargs.get("additional_config") or {}),
                CONFIG_KEY: options,
            }
        super().__init__(*args, **kwargs)
