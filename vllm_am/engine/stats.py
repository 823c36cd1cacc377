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
