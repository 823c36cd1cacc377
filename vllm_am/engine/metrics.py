"""Compaction counters, from the scheduler to Prometheus.

vLLM symbols touched: ``v1.metrics.loggers.StatLoggerManager.__init__`` and ``.record`` are wrapped
when compaction is on. Why: the scheduler lives in the engine core process, ``/metrics`` in the API
server; ``SchedulerStats.kv_connector_stats`` is the one free-form field that travels between them.
It is ours to use because KV connectors are refused together with compaction; ``record`` takes our
entry out before vLLM's own loggers, which expect a connector behind it, see it. This can go when
vLLM lets a plugin add scheduler statistics.
"""

from __future__ import annotations

import functools
from collections import Counter as Tally
from dataclasses import asdict, dataclass, field
from typing import Any

import prometheus_client
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from vllm_am.config import CONFIG_KEY
from vllm_am.engine.messages import FAILURES

_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ERROR_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0)


@dataclass
class CompactionStats:
    """What happened since the last report; falsy when nothing did."""

    compactions: int = 0
    tokens: int = 0
    slots: int = 0
    blocks_freed: int = 0
    seconds: list[float] = field(default_factory=list)
    output_errors: list[float] = field(default_factory=list)
    mass_errors: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    reference_tokens: int = 0
    reference_shortfalls: int = 0
    merges: int = 0

    @classmethod
    def one(
        cls,
        *,
        tokens: int,
        slots: int,
        blocks_freed: int,
        seconds: float,
        output_error: float,
        mass_error: float,
    ) -> CompactionStats:
        """The statistics of a single compaction."""
        return cls(1, tokens, slots, blocks_freed, [seconds], [output_error], [mass_error])

    def __bool__(self) -> bool:
        return bool(
            self.compactions
            or self.merges
            or self.failures
            or self.reference_tokens
            or self.reference_shortfalls
        )

    def add(self, other: CompactionStats) -> None:
        """Add ``other``'s counts and observations to these."""
        self.compactions += other.compactions
        self.merges += other.merges
        self.tokens += other.tokens
        self.slots += other.slots
        self.blocks_freed += other.blocks_freed
        self.seconds += other.seconds
        self.output_errors += other.output_errors
        self.mass_errors += other.mass_errors
        self.reference_tokens += other.reference_tokens
        self.reference_shortfalls += other.reference_shortfalls
        self.failures = dict(Tally(self.failures) + Tally(other.failures))

    def forget_old_observations(self, keep: int = 1000) -> None:
        """Bound the lists, where the statistics are kept for good."""
        for observations in (self.seconds, self.output_errors, self.mass_errors):
            del observations[:-keep]

    def attach(self, stats: SchedulerStats) -> None:
        """Put these on their way to the front end."""
        stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), CONFIG_KEY: asdict(self)}

    @classmethod
    def detach(cls, stats: SchedulerStats | None) -> CompactionStats | None:
        """Take them out again, so that vLLM's connector metrics never see them."""
        if stats is None or not stats.kv_connector_stats:
            return None
        entry = stats.kv_connector_stats.pop(CONFIG_KEY, None)
        stats.kv_connector_stats = stats.kv_connector_stats or None
        return None if entry is None else cls(**entry)


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
        self._seconds = prometheus_client.Histogram(
            "vllm:kv_compaction_seconds",
            "Time of the fit of one compaction or merge.",
            labels,
            buckets=_SECONDS_BUCKETS,
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
        for engine in engine_indexes:  # so that every series exists from the start
            self.record(CompactionStats(failures=dict.fromkeys(FAILURES, 0)), engine)

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
        for reason, count in stats.failures.items():
            self._failures.labels(*labels, reason).inc(count)
        for histogram, values in (
            (self._seconds.labels(*labels), stats.seconds),
            (self._output_error.labels(*labels), stats.output_errors),
            (self._mass_error.labels(*labels), stats.mass_errors),
        ):
            for value in values:
                histogram.observe(value)


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
