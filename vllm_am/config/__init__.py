"""The options of KV compaction: one object for an engine, one for a request.

Filled from the command line (:mod:`vllm_am.engine.frontend.flags`), from
``LLM(additional_config={"kv_compaction": {...}})`` or from a request's ``vllm_xargs``, validated
once, then passed around as a whole. Imports no vLLM.
"""

from __future__ import annotations

from vllm_am.config.budgets import BUDGETS, BY_SCORES, parse_budgets
from vllm_am.config.errors import CompactionConfigError, shown
from vllm_am.config.json_text import parse_json
from vllm_am.config.options import CACHE_MODES, CompactionConfig
from vllm_am.config.queries import PASS_SOURCES, QUERY_SOURCES, STARTERS
from vllm_am.config.ratio_threshold import (
    DEFAULT_THRESHOLD_TOKENS,
    LEAST_RATIO,
    Threshold,
    parse_ratio,
    parse_threshold,
)
from vllm_am.config.request import PREFIX_FIELD, PREFIX_TOKENS_FIELD, RequestOverrides

#: Key of the options inside vLLM's ``additional_config``.
CONFIG_KEY = "kv_compaction"

__all__ = [
    "BUDGETS",
    "BY_SCORES",
    "CACHE_MODES",
    "CONFIG_KEY",
    "DEFAULT_THRESHOLD_TOKENS",
    "LEAST_RATIO",
    "PASS_SOURCES",
    "PREFIX_FIELD",
    "PREFIX_TOKENS_FIELD",
    "QUERY_SOURCES",
    "STARTERS",
    "CompactionConfig",
    "CompactionConfigError",
    "RequestOverrides",
    "Threshold",
    "parse_budgets",
    "parse_json",
    "parse_ratio",
    "parse_threshold",
    "shown",
]
