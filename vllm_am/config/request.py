"""What one request may change: its options in ``vllm_xargs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_am.config.errors import CompactionConfigError
from vllm_am.config.ratio_threshold import parse_ratio, parse_threshold


@dataclass(frozen=True)
class RequestOverrides:
    """What one request may change, through ``vllm_xargs`` / ``SamplingParams.extra_args``."""

    enabled: bool = True
    ratio: float | None = None
    threshold_tokens: int | None = None

    FIELDS = ("kv_compaction", "kv_compaction_ratio", "kv_compaction_threshold")

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestOverrides:
        """Raises :class:`CompactionConfigError` naming the field."""
        if not extra_args:
            return cls()
        unknown = [
            k for k in extra_args if str(k).startswith("kv_compaction") and k not in cls.FIELDS
        ]
        if unknown:
            raise CompactionConfigError(
                f"{unknown[0]}: unknown field; the fields are {', '.join(cls.FIELDS)}"
            )
        mode = extra_args.get("kv_compaction", "on")
        if mode not in ("on", "off"):
            raise CompactionConfigError(f"kv_compaction={mode!r}: expected 'on' or 'off'")
        ratio = extra_args.get("kv_compaction_ratio")
        threshold = extra_args.get("kv_compaction_threshold")
        return cls(
            enabled=mode == "on",
            ratio=None if ratio is None else parse_ratio(ratio, "kv_compaction_ratio"),
            threshold_tokens=None
            if threshold is None
            else parse_threshold(threshold, "kv_compaction_threshold", allow_share=False).tokens,
        )
