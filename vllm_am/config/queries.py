"""Where reference queries come from, and what the passes of each source read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vllm_am.config.errors import CompactionConfigError, shown

#: Sources of reference queries that need passes through the model behind the context.
PASS_SOURCES = ("repeat-prefill", "self-study", "prompts")
#: Where reference queries can come from.
QUERY_SOURCES = ("context-rotated", "context-prefill", *PASS_SOURCES, "random")

#: What the model is asked to do, to see what it looks for (the fixed specs of the paper's code).
STARTERS = (
    "Summarize the main points of the text above.",
    "Collect all key facts that the text above states, one per line.",
    "Restructure the text above as JSON, with every date, time, name and number in it.",
    "Write three different questions that test whether somebody has read the text above "
    "closely, and answer each of them.",
)


def parse_queries(
    value: Any, name: str = "--kv-compaction-config queries"
) -> str | dict[str, float]:
    """One of :data:`QUERY_SOURCES`, or a mixture ``{source: fraction}``, normalised to sum 1.

    Raises:
        CompactionConfigError: an unknown source, or fractions that are no positive numbers.
    """
    shares = {value: 1.0} if isinstance(value, str) else value
    good = isinstance(shares, Mapping) and all(
        source in QUERY_SOURCES
        and isinstance(share, int | float)
        and not isinstance(share, bool)
        and 0 < share < math.inf
        for source, share in shares.items()
    )
    if not good or not shares:
        raise CompactionConfigError(
            f"{name}={shown(value)}: expected one of {', '.join(QUERY_SOURCES)}, or an object of "
            f'positive fractions of them such as {{"self-study": 0.5, "context-rotated": 0.5}}'
        )
    if {"context-rotated", "context-prefill"} <= set(shares):
        raise CompactionConfigError(
            f"{name}={shown(value)}: context-rotated and context-prefill are the same queries, "
            "choose one of them"
        )
    total = sum(shares.values())
    return value if isinstance(value, str) else {s: share / total for s, share in shares.items()}


def parse_reference_prompts(
    value: Any, name: str = "--kv-compaction-config reference_prompts"
) -> dict[str, list[list[int]]]:
    """Token ids ``{source: [[id, ...], ...]}`` of what the reference passes of a source read.

    Raises:
        CompactionConfigError: anything else.
    """
    good = isinstance(value, Mapping) and all(
        source in PASS_SOURCES
        and isinstance(texts, list | tuple)
        and texts
        and all(isinstance(ids, list | tuple) and ids for ids in texts)
        and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for t in texts for i in t)
        for source, texts in value.items()
    )
    if not good:
        raise CompactionConfigError(
            f"{name}={shown(value)}: expected lists of token ids by source "
            f"({', '.join(PASS_SOURCES)}), "
            'such as {"prompts": [[5, 17, 3], [8]]}'
        )
    return {source: [list(ids) for ids in texts] for source, texts in value.items()}
