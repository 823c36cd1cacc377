"""What one request may change: its options in ``vllm_xargs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_am.config.errors import CompactionConfigError, shown
from vllm_am.config.ratio_threshold import parse_ratio, parse_threshold


@dataclass(frozen=True)
class RequestOverrides:
    """What one request may change, through ``vllm_xargs`` / ``SamplingParams.extra_args``."""

    enabled: bool = True
    ratio: float | None = None
    threshold_tokens: int | None = None
    cache: bool | None = None
    """Whether it begins with compacted prefixes of others and leaves its own; None: as the engine
    does."""

    FIELDS = (
        "kv_compaction",
        "kv_compaction_ratio",
        "kv_compaction_threshold",
        "kv_compaction_cache",
    )

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestOverrides:
        """From what the client sent, whatever that is.

        Raises:
            CompactionConfigError: naming the field.
        """
        if not extra_args:
            return cls()
        for key in extra_args:
            if _is_meant_for_us(key) and key not in cls.FIELDS:
                raise CompactionConfigError(
                    f"{_plain(key)}: unknown field; the fields are {', '.join(cls.FIELDS)}"
                )
        for switch in ("kv_compaction", "kv_compaction_cache"):
            mode = extra_args.get(switch, "on")
            if not isinstance(mode, str) or mode not in ("on", "off"):
                raise CompactionConfigError(f"{switch}={shown(mode)}: expected 'on' or 'off'")
        cache = extra_args.get("kv_compaction_cache")
        ratio = extra_args.get("kv_compaction_ratio")
        threshold = extra_args.get("kv_compaction_threshold")
        return cls(
            enabled=extra_args.get("kv_compaction", "on") == "on",
            ratio=None if ratio is None else parse_ratio(ratio, "kv_compaction_ratio"),
            threshold_tokens=None
            if threshold is None
            else parse_threshold(threshold, "kv_compaction_threshold", allow_share=False).tokens,
            cache=None if cache is None else cache == "on",
        )


def _is_meant_for_us(key: Any) -> bool:
    """Also when it is misspelt: ``kv-compaction``, ``KV_COMPACTION_RATIO``."""
    text = key.lower().replace("-", "_") if isinstance(key, str) else ""
    return text.startswith("kv_compaction") or text.startswith("kvcompaction")


def _plain(key: str) -> str:
    """A field's name as a message repeats it."""
    return shown(key).strip("'\"")
