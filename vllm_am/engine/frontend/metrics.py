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
    "pressed_steps": "Engine steps with more time for fits, as somebody waited for KV blocks.",
    "thin_spans": "Spans left exact, as the query pool was full when they were read.",
    "media_requests": "Requests left exact because they bring images, audio or video.",
    "cache_queries": "Requests that were looked up in the cache of compacted prefixes.",
    "cache_hits": "Of these, requests that began on a compacted prefix.",
    "cache_hit_tokens": "Tokens that the compacted prefixes stood for.",
    "cache_adoptions": "Segments that running sequences took over in place of a fit.",
    "cache_evictions": "Compacted prefixes whose blocks were handed out to others.",
    "cache_loads": "Compacted prefixes that were read from files.",
}


class CompactionMetrics:
    """The ``vllm:kv_compaction_*`` metrics, labelled like vLLM's own."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        labels = ["model_name", "engine"]
        self._model_name = vllm_config.model_config.served_model_name
        self._compactions = prometheus_client.Counter(
            "vllm:kv_compaction_compactions", "Spans of KV cache compacted.", labels
        )
        self._merges = prometheus_client.Counter(
            "vllm:kv_compaction_merges", "Times a sequence's segments were merged into one.", labels
        )
        self._tokens = prometheus_client.Counter(
            "vllm:kv_compaction_tokens", "Tokens whose KV was compacted.", labels
        )
        self._slots = prometheus_client.Counter(
            "vllm:kv_compaction_slots", "Slots per head that compacted tokens were kept in.", labels
        )
        self._blocks = prometheus_client.Counter(
            "vllm:kv_compaction_blocks_freed", "KV blocks that compaction gave back.", labels
        )
        self._failures = prometheus_client.Counter(
            "vllm:kv_compaction_failures",
            "Compactions given up; the sequence stayed exact.",
            [*labels, "reason"],
        )
        self._reference_tokens = prometheus_client.Counter(
            "vllm:kv_compaction_reference_tokens",
            "Tokens computed by reference passes; no part of any other metric.",
            labels,
        )
        self._reference_shortfalls = prometheus_client.Counter(
            "vllm:kv_compaction_reference_shortfalls",
            "Compactions whose reference passes were left out or cut short, for want of room.",
            labels,
        )
        self._counters = {
            field: prometheus_client.Counter(f"vllm:kv_compaction_{field}", text, labels)
            for field, text in _COUNTERS.items()
        }
        self._seconds = prometheus_client.Histogram(
            "vllm:kv_compaction_seconds",
            "Time of the fit of one compaction or merge.",
            labels,
            buckets=_SECONDS_BUCKETS,
        )
        self._step_seconds = prometheus_client.Histogram(
            "vllm:kv_compaction_step_seconds",
            "Time that fits have added to one engine step (bounded by step_ms).",
            labels,
            buckets=_STEP_BUCKETS,
        )
        self._output_error = prometheus_client.Histogram(
            "vllm:kv_compaction_output_error",
            "Mean relative error of the attention output on held-out queries.",
            labels,
            buckets=_ERROR_BUCKETS,
        )
        self._mass_error = prometheus_client.Histogram(
            "vllm:kv_compaction_mass_error",
            "Mean relative error of the attention mass on held-out queries.",
            labels,
            buckets=_ERROR_BUCKETS,
        )
        # As vLLM's own gauges where several API servers write them: the latest value counts.
        self._gauges = {
            field: prometheus_client.Gauge(
                f"vllm:kv_compaction_{name}", text, labels, multiprocess_mode="mostrecent"
            )
            for field, (name, text) in _GAUGES.items()
        }
        info = _info(vllm_config)
        self._info = prometheus_client.Gauge(
            "vllm:kv_compaction_info",
            "Options of KV compaction, in the labels; always 1.",
            [*labels, *info],
            multiprocess_mode="mostrecent",
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
        self._compactions.labels(*labels).inc(stats.compactions)
        self._merges.labels(*labels).inc(stats.merges)
        self._tokens.labels(*labels).inc(stats.tokens)
        self._slots.labels(*labels).inc(stats.slots)
        self._blocks.labels(*labels).inc(stats.blocks_freed)
        self._reference_tokens.labels(*labels).inc(stats.reference_tokens)
        self._reference_shortfalls.labels(*labels).inc(stats.reference_shortfalls)
        for field, counter in self._counters.items():
            counter.labels(*labels).inc(getattr(stats, field))
        for reason, count in stats.failures.items():
            self._failures.labels(*labels, reason).inc(count)
        for histogram, values in (
            (self._seconds.labels(*labels), stats.seconds),
            (self._step_seconds.labels(*labels), stats.step_seconds),
            (self._output_error.labels(*labels), stats.output_errors),
            (self._mass_error.labels(*labels), stats.mass_errors),
        ):
            for value in values:
                histogram.observe(value)
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
