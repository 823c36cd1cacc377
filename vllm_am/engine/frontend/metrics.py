"""The Prometheus metrics of compaction.

vLLM symbols touched: ``v1.metrics.loggers.StatLoggerManager.__init__`` and ``.record`` are wrapped
when compaction is on. Why: the scheduler lives in the engine core process, ``/metrics`` in the API
server, and what the one counts reaches the other through vLLM's own statistics (``stats.py``). This
can go when vLLM lets a plugin add scheduler statistics.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import prometheus_client
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from vllm_am.config import CONFIG_KEY, CompactionConfig
from vllm_am.engine.messages import FAILURES
from vllm_am.engine.rotation import queries_in_effect
from vllm_am.engine.stats import CompactionStats, Holdings

_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_ERROR_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0)

_PREFIX = "vllm:kv_compaction_"

#: By field of ``Holdings``: name and help of its gauge.
_GAUGES = {
    "sequences": ("sequences", "Sequences of which a part is compacted."),
    "fits": ("fits_running", "Fits and merges under way."),
    "slots": ("slots_held", "Slots per head of all compacted parts."),
    "blocks": ("blocks_held", "KV blocks of compacted parts and of fits under way."),
    "query_pool_share": ("query_pool_usage_perc", "Share of the query pool in use, 1 is all."),
    "cache_entries": ("cache_entries", "Compacted prefixes that requests may begin with."),
    "cache_blocks_used": (
        "cache_blocks_used",
        "KV blocks of compacted prefixes that sequences stand on.",
    ),
    "cache_blocks_free": (
        "cache_blocks_free",
        "KV blocks of compacted prefixes that nobody uses, so that the pool may hand them out.",
    ),
    "cache_blocks_pinned": ("cache_blocks_pinned", "KV blocks that named prefixes hold."),
}

#: By field of ``CompactionStats``: help of its counter.
_COUNTERS = {
    "compactions": "Spans of KV cache compacted.",
    "merges": "Times a sequence's segments were merged into one.",
    "tokens": "Tokens whose KV was compacted.",
    "slots": "Slots per head that compacted tokens were kept in.",
    "blocks_freed": "KV blocks that compaction gave back.",
    "reference_tokens": "Tokens computed by reference passes; no part of any other metric.",
    "reference_shortfalls": (
        "Compactions whose reference passes were left out or cut short, for want of room."
    ),
    "pressed_steps": "Engine steps with more time for fits, as somebody waited for KV blocks.",
    "thin_spans": "Spans left exact, as the query pool was full when they were read.",
    "short_requests": (
        "Requests past their threshold left exact, as max_tokens ended them before it would pay."
    ),
    "media_requests": "Requests left exact because they bring images, audio or video.",
    "cache_queries": "Requests that were looked up in the cache of compacted prefixes.",
    "cache_hits": "Of these, requests that began on a compacted prefix.",
    "cache_hit_tokens": "Tokens that the compacted prefixes stood for.",
    "cache_adoptions": "Segments that running sequences took over in place of a fit.",
    "cache_evictions": "Compacted prefixes whose blocks were handed out to others.",
    "cache_loads": "Compacted prefixes that were read from files.",
}


#: By field of ``CompactionStats``: name, help and buckets of its histogram.
_HISTOGRAMS = {
    "seconds": ("seconds", "Time of the fit of one compaction or merge.", _SECONDS_BUCKETS),
    "step_seconds": (
        "step_seconds",
        "Time that fits have added to one engine step (bounded by step_ms).",
        _STEP_BUCKETS,
    ),
    "output_errors": (
        "output_error",
        "Mean relative error of the attention output on held-out queries.",
        _ERROR_BUCKETS,
    ),
    "mass_errors": (
        "mass_error",
        "Mean relative error of the attention mass on held-out queries.",
        _ERROR_BUCKETS,
    ),
}

_FAILURES = "Compactions given up, by reason; the sequence stayed exact."
_INFO = "Options of KV compaction, in the labels; always 1."


def described() -> list[tuple[str, str, str]]:
    """Name as Prometheus has it, type and help of each metric, for the documentation."""
    counters = [(f"{field}_total", "counter", text) for field, text in _COUNTERS.items()]
    histograms = [(name, "histogram", text) for name, text, _ in _HISTOGRAMS.values()]
    gauges = [(name, "gauge", text) for name, text in _GAUGES.values()]
    others = [("failures_total", "counter", _FAILURES), ("info", "gauge", _INFO)]
    return [
        (f"{_PREFIX}{name}", kind, text)
        for name, kind, text in (*counters, *histograms, *gauges, *others)
    ]


class CompactionMetrics:
    """The ``vllm:kv_compaction_*`` metrics, labelled like vLLM's own."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        labels = ["model_name", "engine"]
        self._model_name = vllm_config.model_config.served_model_name
        self._counters = {
            field: prometheus_client.Counter(f"{_PREFIX}{field}", text, labels)
            for field, text in _COUNTERS.items()
        }
        self._failures = prometheus_client.Counter(
            f"{_PREFIX}failures", _FAILURES, [*labels, "reason"]
        )
        self._histograms = {
            field: prometheus_client.Histogram(f"{_PREFIX}{name}", text, labels, buckets=buckets)
            for field, (name, text, buckets) in _HISTOGRAMS.items()
        }
        # As vLLM's own gauges where several API servers write them: the latest value counts.
        self._gauges = {
            field: prometheus_client.Gauge(
                f"{_PREFIX}{name}", text, labels, multiprocess_mode="mostrecent"
            )
            for field, (name, text) in _GAUGES.items()
        }
        info = _info(vllm_config)
        self._info = prometheus_client.Gauge(
            f"{_PREFIX}info", _INFO, [*labels, *info], multiprocess_mode="mostrecent"
        )
        for engine in engine_indexes:
            self._info.labels(self._model_name, str(engine), *info.values()).set(1)
        for engine in engine_indexes:  # so that every series exists from the start
            self.record(
                CompactionStats(failures=dict.fromkeys(FAILURES, 0), now=Holdings()), engine
            )

    def record(self, stats: CompactionStats, engine: int) -> None:
        """Add one report of engine ``engine``."""
        labels = (self._model_name, str(engine))
        for field, counter in self._counters.items():
            counter.labels(*labels).inc(getattr(stats, field))
        for reason, count in stats.failures.items():
            self._failures.labels(*labels, reason).inc(count)
        for field, histogram in self._histograms.items():
            observe = histogram.labels(*labels).observe
            for value in getattr(stats, field):
                observe(value)
        if stats.now is not None:
            for field, gauge in self._gauges.items():
                gauge.labels(*labels).set(getattr(stats.now, field))


def _info(vllm_config: VllmConfig) -> dict[str, str]:
    """What tells one configuration from another, for a metric's labels."""
    config = CompactionConfig.from_dict(vllm_config.additional_config[CONFIG_KEY])
    return {
        "version": version("vllm-am"),
        "method": config.method,
        "ratio": f"{config.ratio:g}",
        "threshold": str(config.threshold or "default"),
        "budgets": config.budgets if isinstance(config.budgets, str) else "file",
        "queries": queries_in_effect(config, vllm_config.model_config.hf_text_config),
    }


def install() -> None:
    """Wrap the front end's stat loggers; once per process, only when compaction is on."""
    if hasattr(StatLoggerManager, "_kv_compaction_installed"):
        return
    StatLoggerManager._kv_compaction_installed = True
    original_init, original_record = StatLoggerManager.__init__, StatLoggerManager.record

    @functools.wraps(original_init)
    def __init__(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        original_init(self, vllm_config, *args, **kwargs)
        self._kv_compaction = None
        if (vllm_config.additional_config or {}).get(CONFIG_KEY) is not None:
            # After vLLM's own: it unregisters every "vllm:" metric before it registers its own.
            self._kv_compaction = CompactionMetrics(vllm_config, list(self.engine_indexes))

    @functools.wraps(original_record)
    def record(
        self: Any,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        stats = CompactionStats.detach(scheduler_stats)
        if stats is not None and self._kv_compaction is not None:
            self._kv_compaction.record(stats, engine_idx or 0)
        original_record(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    StatLoggerManager.__init__ = __init__
    StatLoggerManager.record = record
