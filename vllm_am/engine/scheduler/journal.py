"""What is said and counted about each compaction: log lines, and statistics for the front end.

Nothing else in this room logs or counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.metrics.stats import SchedulerStats

from vllm_am.engine.messages import TOO_LOSSY, FitReport, Segment
from vllm_am.engine.scheduler.query_sources import QUERIES_PER_SLOT
from vllm_am.engine.stats import CompactionStats, Holdings

if TYPE_CHECKING:
    from vllm_am.engine.prefix_file import PrefixFile
    from vllm_am.engine.scheduler.jobs import Job
    from vllm_am.engine.scheduler.named_prefixes import NamedPrefix

logger = init_logger("vllm.kv_compaction")


class Journal:
    """Log lines and statistics of one engine.

    Args:
        collected: whether somebody collects what is counted (vLLM's ``log_stats``).
    """

    def __init__(self, collected: bool) -> None:
        self.totals = CompactionStats()
        """Since the start; of observations the last ones."""
        self._collected = collected
        self._new = CompactionStats()
        self._held = Holdings()
        self._said_few_queries = False

    def count(self, stats: CompactionStats) -> None:
        """Add ``stats`` to what is going to be handed over."""
        self.totals.add(stats)
        self.totals.forget_old_observations()
        if self._collected:  # else nobody would ever collect them
            self._new.add(stats)

    def hand_over(self, stats: SchedulerStats, now: Holdings) -> None:
        """Put what was counted since the last time on its way to the front end.

        Args:
            now: what is held at present.
        """
        if now != self._held:
            self._held = self._new.now = now
        if self._new:
            self._new.attach(stats)
            self._new = CompactionStats()

    def started(self, job: Job, queries_per_kv: int, shortfall: bool) -> None:
        """A compaction begins.

        Args:
            queries_per_kv: reference queries that each sampled position gives a KV head.
            shortfall: without the passes that it should have, or not in the middle of them.
        """
        if shortfall:
            self.count(CompactionStats(reference_shortfalls=1))
        segment = job.segment
        queries = job.queries.positions * queries_per_kv
        needed = QUERIES_PER_SLOT * segment.slots
        lossy = segment.slots < segment.end - segment.start
        if lossy and queries < needed and not self._said_few_queries:
            self._said_few_queries = True
            logger.warning(
                "KV compaction: request %s: %d reference queries per KV head for %d slots, and at "
                "least %d are advisable: raise reference_queries or query_pool_share in "
                "--kv-compaction-config, or mix in another source (not said again)",
                job.request.request_id,
                queries,
                segment.slots,
                needed,
            )

    def compacted(self, job: Job, report: FitReport, freed: int, returned: int) -> None:
        """A span of tokens was compacted.

        Args:
            freed: blocks that the sequence holds less.
            returned: blocks that the pool has more; the others are still shared.
        """
        segment = job.segment
        tokens = segment.end - segment.start
        self.count(
            CompactionStats.one(
                tokens=tokens,
                slots=segment.slots,
                blocks_freed=freed,
                seconds=report.seconds,
                output_error=report.output_error,
                mass_error=report.mass_error,
            )
        )
        logger.info(
            "KV compaction: request %s, tokens [%d, %d): %d tokens -> %d slots per head (%.1fx), "
            "%d -> %d blocks (%d freed%s), %.0f ms, held-out error: output %.3f, mass %.3f",
            job.request.request_id,
            segment.start,
            segment.end,
            tokens,
            segment.slots,
            tokens / segment.slots,
            len(job.source_block_ids),
            len(segment.block_ids),
            freed,
            "" if returned >= freed else f", {freed - returned} of them still shared",
            1e3 * report.seconds,
            report.output_error,
            report.mass_error,
        )

    def too_few_queries(self, request_id: str) -> None:
        """A sequence stays exact, since the query pool was full when it was read."""
        log = logger.debug if self.totals.thin_spans else logger.warning
        self.count(CompactionStats(thin_spans=1))
        log(
            "KV compaction: request %s stays exact: the query pool was full when it was read; more "
            "sequences are read at once than it has room for: raise query_pool_share in "
            "--kv-compaction-config (more of these are only counted: "
            "vllm:kv_compaction_thin_spans_total)",
            request_id,
        )

    def too_short(self, request_id: str, max_tokens: int) -> None:
        """A request has ended that was long enough to be compacted, but not for long enough."""
        log = logger.debug if self.totals.short_requests else logger.info
        self.count(CompactionStats(short_requests=1))
        log(
            "KV compaction: request %s has passed its threshold and stayed exact: with %d tokens "
            "to generate it would end before its compaction had paid (vllm_xargs "
            '{"kv_compaction": "force"} compacts it all the same; more of these are only counted: '
            "vllm:kv_compaction_short_requests_total)",
            request_id,
            max_tokens,
        )

    def looked_up(self, request_id: str, tokens: int) -> None:
        """A request was admitted that may begin on compacted prefixes.

        Args:
            tokens: that these stand for; 0 if there were none.
        """
        self.count(
            CompactionStats(cache_queries=1, cache_hits=bool(tokens), cache_hit_tokens=tokens)
        )
        if tokens:
            logger.info(
                "KV compaction: request %s begins on a compacted prefix of %d tokens",
                request_id,
                tokens,
            )

    def adopted(self, request_id: str, segment: Segment, freed: int) -> None:
        """A sequence has taken another's segment in place of a fit of its own.

        Args:
            freed: blocks that it holds less, counting those that it shares.
        """
        self.count(CompactionStats(cache_adoptions=1))
        logger.info(
            "KV compaction: request %s, tokens [%d, %d): compacted before, %d slots per head are "
            "shared (%d blocks freed)",
            request_id,
            segment.start,
            segment.end,
            segment.slots,
            freed,
        )

    def evicted(self, count: int) -> None:
        """Compacted prefixes have lost their blocks to others."""
        if count:
            self.count(CompactionStats(cache_evictions=count))

    def merged(self, job: Job, report: FitReport, segments: int, slots: int) -> None:
        """Segments became one.

        Args:
            segments: how many there were.
            slots: that they had per head.
        """
        freed = len(job.source_block_ids) - len(job.segment.block_ids)
        self.count(
            CompactionStats(
                merges=1,
                blocks_freed=freed,
                seconds=[report.seconds],
                output_errors=[report.output_error],
                mass_errors=[report.mass_error],
            )
        )
        logger.info(
            "KV compaction: request %s, tokens [%d, %d): %d segments merged, %d -> %d slots per "
            "head (%d blocks freed), %.0f ms, held-out error: output %.3f, mass %.3f",
            job.request.request_id,
            job.segment.start,
            job.segment.end,
            segments,
            slots,
            job.segment.slots,
            freed,
            1e3 * report.seconds,
            report.output_error,
            report.mass_error,
        )

    def failed(self, job: Job, reason: str) -> None:
        """A fit or a merge was given up. Loud once for each reason; the metric counts them all."""
        log = logger.debug if reason in self.totals.failures else logger.warning
        self.count(CompactionStats(failures={reason: 1}))
        log(
            "KV compaction: request %s, tokens [%d, %d): %s failed (%s); the sequence stays "
            "%s (more of these are only counted: vllm:kv_compaction_failures)",
            job.request.request_id,
            job.segment.start,
            job.segment.end,
            "merge" if job.merges else "fit",
            reason,
            "as it is" if job.merges else "uncompacted and exact",
        )

    def too_lossy(self, job: Job, report: FitReport, max_error: float, again: bool) -> None:
        """A fit exceeded the error bound.

        Args:
            again: whether it is tried with more slots.
        """
        self.count(CompactionStats(failures={TOO_LOSSY: 1}))
        logger.info(
            "KV compaction: request %s, tokens [%d, %d): held-out output error %.3f with %d slots "
            "per head is above max_error %g; %s",
            job.request.request_id,
            job.segment.start,
            job.segment.end,
            report.output_error,
            job.segment.slots,
            max_error,
            "tried again with twice as many" if again else "the sequence stays exact",
        )

    def prefix_pinned(self, prefix: NamedPrefix) -> None:
        """A compacted prefix was given a name."""
        logger.info(
            "KV compaction: prefix %r: %d tokens are pinned (%d blocks)",
            prefix.name,
            len(prefix.token_ids),
            len(prefix.blocks),
        )

    def prefix_dropped(self, name: str) -> None:
        """And taken away again."""
        logger.info("KV compaction: prefix %r: is pinned no more", name)

    def prefix_loaded(self, file: PrefixFile, answer: dict[str, Any]) -> None:
        """A file was read, or could not be."""
        if "refused" in answer:
            logger.error("KV compaction: a prefix was not loaded: %s", answer["says"])
            return
        self.count(CompactionStats(cache_loads=1))
        logger.info(
            "KV compaction: prefix %r: loaded from %s, %d tokens in %d blocks are pinned",
            answer["name"],
            file.path,
            answer["tokens"],
            answer["blocks"],
        )

    def refused(self, request_id: str, reason: str) -> None:
        """A request's own options are wrong, and no front end has said so."""
        logger.warning("KV compaction: request %s is refused: %s", request_id, reason)

    def unservable(self, request_id: str, tokens: int, pool_tokens: int) -> None:
        """A request is finished with an error.

        Args:
            tokens: that it has.
            pool_tokens: that the whole pool holds.
        """
        logger.error(
            "KV compaction: request %s is finished with an error: the KV pool (%d tokens) cannot "
            "hold its %d tokens uncompacted, and its fits failed (for the reasons logged above and "
            "counted in vllm:kv_compaction_failures)",
            request_id,
            pool_tokens,
            tokens,
        )
