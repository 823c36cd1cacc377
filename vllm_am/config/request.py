"""What one request may change: its options in ``vllm_xargs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_am.config.errors import CompactionConfigError, shown
from vllm_am.config.ratio_threshold import parse_ratio, parse_threshold

#: Length of the part of a prompt that others begin with, too; and the same counted in messages,
#: which the front end turns into tokens.
PREFIX_TOKENS_FIELD, PREFIX_FIELD = "kv_compaction_prefix_tokens", "kv_compaction_prefix"


#: Fields with a few values.
_SWITCHES = {"kv_compaction": ("on", "off", "force"), "kv_compaction_cache": ("on", "off")}


@dataclass(frozen=True)
class RequestOverrides:
    """What one request may change, through ``vllm_xargs`` / ``SamplingParams.extra_args``."""

    enabled: bool = True
    forced: bool = False
    """Compacted even if it ends too soon to gain by it."""
    ratio: float | None = None
    threshold_tokens: int | None = None
    cache: bool | None = None
    """Whether it begins with compacted prefixes of others and leaves its own; None: as the engine
    does."""
    prefix_tokens: int | None = None
    """Length of the part of its prompt that others have, too: its first span ends there."""

    FIELDS = (
        "kv_compaction",
        "kv_compaction_ratio",
        "kv_compaction_threshold",
        "kv_compaction_cache",
        PREFIX_FIELD,
        PREFIX_TOKENS_FIELD,
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
        for switch, modes in _SWITCHES.items():
            mode = extra_args.get(switch, "on")
            if not isinstance(mode, str) or mode not in modes:
                expected = " or ".join(map(repr, modes))
                raise CompactionConfigError(f"{switch}={shown(mode)}: expected {expected}")
        if PREFIX_FIELD in extra_args:
            raise CompactionConfigError(
                f"{PREFIX_FIELD}={shown(extra_args[PREFIX_FIELD])}: expected in chat requests to "
                f"an API server only, whose messages can be counted; give {PREFIX_TOKENS_FIELD}"
            )
        cache = extra_args.get("kv_compaction_cache")
        prefix = extra_args.get(PREFIX_TOKENS_FIELD)
        ratio = extra_args.get("kv_compaction_ratio")
        threshold = extra_args.get("kv_compaction_threshold")
        return cls(
            enabled=extra_args.get("kv_compaction", "on") != "off",
            forced=extra_args.get("kv_compaction", "on") == "force",
            ratio=None if ratio is None else parse_ratio(ratio, "kv_compaction_ratio"),
            threshold_tokens=None
            if threshold is None
            else parse_threshold(threshold, "kv_compaction_threshold", allow_share=False).tokens,
            cache=None if cache is None else cache == "on",
            prefix_tokens=None if prefix is None else _whole(PREFIX_TOKENS_FIELD, prefix),
        )


def _whole(name: str, value: Any) -> int:
    """A whole number above 0, which some clients can send as a text only."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CompactionConfigError(f"{name}={shown(value)}: expected a whole number of tokens > 0")
    return value


def _is_meant_for_us(key: Any) -> bool:
    """Also when it is misspelt: ``kv-compaction``, ``KV_COMPACTION_RATIO``."""
    text = key.lower().replace("-", "_") if isinstance(key, str) else ""
    return text.startswith("kv_compaction") or text.startswith("kvcompaction")


def _plain(key: str) -> str:
    """A field's name as a message repeats it."""
    return shown(key).strip("'\"")
