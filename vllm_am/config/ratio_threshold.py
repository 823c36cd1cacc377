"""The two options that everybody sets: how much is kept, and when a sequence is compacted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vllm_am.compaction.ratio import share_kept
from vllm_am.config.errors import CompactionConfigError, shown

#: One slot in a million tokens: less is no ratio, but a typing error.
LEAST_RATIO = 1e-6
#: More tokens than any sequence will have.
MOST_TOKENS = 10**9

#: Threshold (tokens) when the user names none: below about 4k tokens the KV cache of one sequence
#: is small beside the weights, so there is little to win; ``resolve_threshold`` lowers it to half
#: of ``max_model_len`` for short-context models, so that the flag is never a silent no-op.
DEFAULT_THRESHOLD_TOKENS = 4096


def parse_ratio(value: Any, name: str = "--kv-compaction-ratio") -> float:
    """The fraction of the compacted KV that is kept: ``0.02``, ``"0.02"`` and ``"50x"`` are one.

    Raises:
        CompactionConfigError: none of these forms, or out of range.
    """
    try:
        ratio = share_kept(value)
    except ValueError as error:
        raise CompactionConfigError(f"{name}={shown(value)}: {error}") from None
    if ratio < LEAST_RATIO:
        raise CompactionConfigError(
            f"{name}={shown(value)}: expected at least {LEAST_RATIO:g} of the KV cache to be KEPT"
        )
    return ratio


@dataclass(frozen=True)
class Threshold:
    """When a sequence is compacted: exactly one of the two is set."""

    tokens: int | None = None
    """Uncompacted tokens that a sequence may hold."""
    pool_share: float | None = None
    """Share of the KV pool that may be in use before sequences are compacted, in (0, 1)."""

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        return f"{100 * (self.pool_share or 0):g}% of the KV pool"


def parse_threshold(
    value: Any, name: str = "--kv-compaction-threshold", allow_share: bool = True
) -> Threshold:
    """``4096`` (tokens per sequence) or ``"80%"`` (share of the KV pool in use).

    Raises:
        CompactionConfigError: neither form, or out of range.
    """
    text = value.strip() if isinstance(value, str) else ""
    if allow_share and text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = math.nan
        if 0.0 < share < 1.0:
            return Threshold(pool_share=share)
    elif isinstance(value, str | int) and not isinstance(value, bool):
        try:
            tokens = int(value)
        except ValueError:
            tokens = 0
        if 0 < tokens <= MOST_TOKENS:
            return Threshold(tokens=tokens)
    share_hint = " or a share of the KV pool such as 80%" if allow_share else ""
    raise CompactionConfigError(
        f"{name}={shown(value)}: expected a positive number of tokens such as 4096{share_hint}"
    )
