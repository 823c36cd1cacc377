"""What the scheduler counts, on its way to the front end and its metrics.

vLLM symbol touched: ``v1.metrics.stats.SchedulerStats.kv_connector_stats``, the one free-form field
that travels from the engine core to the front end. It is ours to use because KV connectors are
refused together with compaction; :meth:`CompactionStats.detach` takes our entry out before vLLM's
own loggers, which expect a connector behind it, see it.
"""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import asdict, dataclass, field

from vllm.v1.metrics.stats import SchedulerStats

from vllm_am.config import CONFIG_KEY


@dataclass(frozen=True)
class Holdings:
    """What compaction holds at one moment."""

    sequences: int = 0
    """Sequences of which a part is compacted."""
    fits: int = 0
    """Fits and merges under way."""
    slots: int = 0
    """Slots per head of all compacted parts."""
    blocks: int = 0
    """Blocks that they occupy, with the targets of fits under way."""
    query_pool_share: float = 0.0
    """Share of the query pool in use."""
    cache_entries: int = 0
    """Compacted prefixes that sequences to come may begin with."""
    cache_blocks_used: int = 0
    """Blocks of theirs that a sequence stands on."""
    cache_blocks_free: int = 0
    """Blocks of theirs that the pool may hand out."""
    cache_blocks_pinned: int = 0
    """Blocks that named prefixes hold."""


@dataclass
class CompactionStats:
    """What happened since the last report; falsy when nothing did."""

    compactions: int = 0
    tokens: int = 0
    slots: int = 0
    blocks_freed: int = 0
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    """What fits have added to each engine step that had any."""
    pressed_steps: int = 0
    """Of these, steps that had more time for them because somebody waited for blocks."""
    output_errors: list[float] = field(default_factory=list)
    mass_errors: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    reference_tokens: int = 0
    reference_shortfalls: int = 0
    merges: int = 0
    thin_spans: int = 0
    """Spans that stayed exact for want of reference queries."""
    short_requests: int = 0
    """Requests that stayed exact because they were to end before a compaction had paid."""
    media_requests: int = 0
    """Requests that stay exact because they bring images, audio or video."""
    cache_queries: int = 0
    cache_hits: int = 0
    cache_hit_tokens: int = 0
    cache_adoptions: int = 0
    cache_evictions: int = 0
    cache_loads: int = 0
    """Prefixes that were read from files."""
    now: Holdings | None = None
    """Where it is not what the last report said."""

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
        return cls(
            compactions=1,
            tokens=tokens,
            slots=slots,
            blocks_freed=blocks_freed,
            seconds=[seconds],
            output_errors=[output_error],
            mass_errors=[mass_error],
        )

    def __bool__(self) -> bool:
        return bool(
            self.compactions
            or self.merges
            or self.failures
            or self.step_seconds
            or self.pressed_steps
            or self.reference_tokens
            or self.reference_shortfalls
            or self.thin_spans
            or self.short_requests
            or self.media_requests
            or self.cache_queries
            or self.cache_adoptions
            or self.cache_evictions
            or self.cache_loads
            or self.now is not None
        )

    def add(self, other: CompactionStats) -> None:
        """Add ``other``'s counts and observations to these."""
        self.compactions += other.compactions
        self.merges += other.merges
        self.tokens += other.tokens
        self.slots += other.slots
        self.blocks_freed += other.blocks_freed
        self.seconds += other.seconds
        self.step_seconds += other.step_seconds
        self.pressed_steps += other.pressed_steps
        self.output_errors += other.output_errors
        self.mass_errors += other.mass_errors
        self.reference_tokens += other.reference_tokens
        self.reference_shortfalls += other.reference_shortfalls
        self.thin_spans += other.thin_spans
        self.short_requests += other.short_requests
        self.media_requests += other.media_requests
        self.cache_queries += other.cache_queries
        self.cache_hits += other.cache_hits
        self.cache_hit_tokens += other.cache_hit_tokens
        self.cache_adoptions += other.cache_adoptions
        self.cache_evictions += other.cache_evictions
        self.cache_loads += other.cache_loads
        self.failures = dict(Tally(self.failures) + Tally(other.failures))
        self.now = self.now if other.now is None else other.now

    def forget_old_observations(self, keep: int = 1000) -> None:
        """Bound the lists, where the statistics are kept for good."""
        lists = (self.seconds, self.step_seconds, self.output_errors, self.mass_errors)
        for observations in lists:
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
        if entry is None:
            return None
        now = entry.pop("now", None)
        return cls(**entry, now=None if now is None else Holdings(**now))
