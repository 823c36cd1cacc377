"""The compactions under way: started, sent to the workers slice by slice, reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.messages import FitReport, FitSlice, OnPolicy, Segment
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.planner import Span
from vllm_am.engine.scheduler.query_pool import QueryPool
from vllm_am.engine.scheduler.reference_queries import JobQueries


@dataclass
class Job:
    """A compaction under way."""

    job_id: int
    request: Request
    segment: Segment
    source_block_ids: tuple[int, ...]
    queries: JobQueries
    parts: int
    slice_work: int
    """Work of one part (see ``EngineLimits.work``)."""
    merges: bool = False
    """The source is all segments of the sequence, not tokens."""
    key: BlockHash | None = None
    """What the segment is to be published under, for other sequences; None: it is not."""
    issued: int = 0
    report: FitReport | None = None


class Jobs:
    """All compactions of an engine that have a target, by request: at most one for each."""

    def __init__(self, limits: EngineLimits, blocks: CompactingManager, pool: QueryPool) -> None:
        self._limits = limits
        self._config = limits.config
        self._blocks = blocks
        self._pool = pool
        self._next_id = 0
        self.running: dict[str, Job] = {}

    @property
    def outstanding_work(self) -> int:
        """Work that is not yet sent (see ``EngineLimits.work``)."""
        return sum(job.slice_work * (job.parts - job.issued) for job in self.running.values())

    @property
    def coming_blocks(self) -> int:
        """Blocks that compactions under way will give back."""
        return sum(len(job.source_block_ids) for job in self.running.values())

    def start(
        self,
        request: Request,
        span: Span,
        queries: JobQueries,
        merges: bool,
        key: BlockHash | None,
    ) -> Job | None:
        """Reserve the target of a compaction and the queries that it reads.

        Args:
            merges: the span is all that was compacted before.
            key: what it is going to be published under, if it is.

        Returns:
            None where the pool or the query pool has no room for it now.
        """
        if not self._pool.can_hold(len(queries.slots)):
            return None
        reserve = self._blocks.reserve_merge if merges else self._blocks.reserve_target
        reserved = reserve(self._next_id, span)
        if reserved is None:
            return None
        segment, source = reserved
        self._pool.forget(segment.block_ids)
        parts, slice_work = self._limits.slices(len(source) * self._limits.block_size, span.slots)
        job = Job(self._next_id, request, segment, source, queries, parts, slice_work, merges, key)
        self._pool.hold(queries.slots_read)
        self._next_id += 1
        self.running[span.request_id] = job
        return job

    def slices(self) -> Iterator[FitSlice]:
        """The next slices, oldest job first, within the work bound of one step (one at least)."""
        budget = self._limits.step_work
        for job in self.running.values():
            while job.issued < job.parts and budget > 0:
                budget -= job.slice_work
                yield self._slice(job)
                job.issued += 1

    def whole(self, job: Job, on_policy: OnPolicy) -> FitSlice:
        """The one slice of a fit that takes place in this step's forward pass."""
        job.issued = job.parts
        return replace(self._slice(job), part=0, parts=1, on_policy=on_policy)

    def _slice(self, job: Job) -> FitSlice:
        """The next one."""
        return FitSlice(
            job.job_id,
            job.request.request_id,
            job.segment,
            job.source_block_ids,
            job.queries.slots,
            job.queries.shifts,
            self._config.method,
            part=job.issued,
            parts=job.parts,
            random_queries=job.queries.drawn,
            merges=job.merges,
        )

    def note(self, report: FitReport) -> None:
        """The workers are done with a job; one that was cancelled meanwhile is nobody's."""
        for job in self.running.values():
            if job.job_id == report.job_id:
                job.report = report

    def take_reported(self) -> Iterator[tuple[Job, FitReport]]:
        """The jobs that are over; their targets are still reserved."""
        for request_id, job in list(self.running.items()):
            if job.report is not None:
                del self.running[request_id]
                self._pool.release(job.queries.slots_read)
                yield job, job.report

    def cancel(self, request_id: str) -> None:
        """The request goes: what was reserved for its compaction goes back."""
        job = self.running.pop(request_id, None)
        if job is not None:
            self._pool.release(job.queries.slots_read)
            self._blocks.release_target(job.job_id)
