"""The compactions under way: started, sent to the workers slice by slice, reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.messages import (
    FitReport,
    FitSlice,
    HeadRange,
    OnPolicy,
    Segment,
    SliceReport,
)
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.pace import JobWork, Pace
from vllm_am.engine.scheduler.planner import Span
from vllm_am.engine.scheduler.query_pool import QueryPool
from vllm_am.engine.scheduler.reference_queries import JobQueries

#: Steps for which a worker is sent work that it can put aside.
AHEAD = 2


@dataclass
class Job:
    """A compaction under way."""

    job_id: int
    request: Request
    segment: Segment
    source_block_ids: tuple[int, ...]
    queries: JobQueries
    work: JobWork
    merges: bool = False
    """The source is all segments of the sequence, not tokens."""
    key: BlockHash | None = None
    """What the segment is to be published under, for other sequences; None: it is not."""
    wanted: bool = False
    """See ``Span``."""
    issued: int = 0
    """Heads that were sent: of all rounds, one behind the other."""
    report: FitReport | None = None

    @property
    def to_send(self) -> int:
        """Heads of all rounds that were not sent yet."""
        return len(self.work.rounds) * len(self.work.fits) - self.issued

    @property
    def next(self) -> tuple[bool, int]:
        """The next head to be sent: whether it is measured (or fitted), and its number."""
        turn, head = divmod(self.issued, len(self.work.fits))
        return self.work.rounds[turn], head


class Jobs:
    """All compactions of an engine that have a target, by request: at most one for each."""

    def __init__(
        self, limits: EngineLimits, blocks: CompactingManager, pool: QueryPool, pace: Pace
    ) -> None:
        self._limits = limits
        self._pace = pace
        self._pauses = limits.pauses_fits
        self._config = limits.config
        self._blocks = blocks
        self._pool = pool
        self._ids = count()
        self._cancelled: list[int] = []
        self._sent: dict[tuple[int, bool, HeadRange], float] = {}
        """Slices that were not reported yet, and what they may take."""
        self.running: dict[str, Job] = {}
        self.detached: dict[int, Job] = {}
        """By number: those whose requests have ended."""

    @property
    def all(self) -> list[Job]:
        """Of requests that run, and of those that have ended."""
        return [*self.running.values(), *self.detached.values()]

    @property
    def outstanding_seconds(self) -> float:
        """What is not yet sent of all of them is going to take."""
        return sum(self._seconds_left(job) for job in self.all)

    def _seconds_left(self, job: Job) -> float:
        """What is not yet sent of one of them is going to take."""
        if not job.to_send:
            return 0.0
        measures, head = job.next
        left = self._pace.seconds(False, sum(job.work.fits[0 if measures else head :]))
        if measures:
            left += self._pace.seconds(True, job.work.measure * (len(job.work.fits) - head))
        return left

    @property
    def coming_blocks(self) -> int:
        """Blocks that compactions under way will give back."""
        return sum(len(job.source_block_ids) for job in self.all)

    def next_id(self) -> int:
        """What the next segment is known by, whoever writes it."""
        return next(self._ids)

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
        job_id = self.next_id()
        reserved = reserve(job_id, span)
        if reserved is None:
            return None
        segment, source = reserved
        self._pool.forget(segment.block_ids)
        tokens = len(source) * self._limits.block_size
        work = self._pace.work(queries.positions, tokens, span.slots)
        job = Job(job_id, request, segment, source, queries, work, merges, key)
        job.wanted = span.wanted and key is not None
        self._pool.hold(queries.slots_read)
        self.running[span.request_id] = job
        return job

    def slices(self) -> Iterator[FitSlice]:
        """The next slices, within what this step has for them; one head at least.

        First of the compaction that gives back most blocks for the time that it still takes. Where
        a worker puts fits aside, it is sent more than it has time for, so that none of that is left
        unused, and more when it has done some of it.
        """
        left, least = self._pace.step_seconds, True
        if self._pauses:
            left = AHEAD * left - sum(self._sent.values())
            least = left > 0
        for job in sorted(self.all, key=self._seconds_per_block):
            while job.to_send and (left > 0 or least):
                fit, seconds = self._next_slice(job, left, at_least_one=least)
                if fit is None:
                    return
                self._sent[fit.job_id, fit.measures, fit.heads] = seconds
                yield fit
                left -= seconds
                least = self._pauses and left > 0

    def _seconds_per_block(self, job: Job) -> float:
        freed = len(job.source_block_ids) - len(job.segment.block_ids)
        return self._seconds_left(job) / max(1, freed)

    def _next_slice(
        self, job: Job, left: float, at_least_one: bool
    ) -> tuple[FitSlice | None, float]:
        """As many of the next heads as fit in the seconds left, and what they may take."""
        measures, first = job.next
        tokens = len(job.source_block_ids) * self._limits.block_size
        most = self._limits.heads_at_once(tokens, job.segment.slots)
        end, work, seconds = first, 0.0, 0.0
        for head in range(first, min(first + most, len(job.work.fits))):
            more = work + job.work.of(measures, head)
            needed = self._pace.cautious_seconds(measures, more)
            if needed > left and not (at_least_one and head == first):
                break
            end, work, seconds = head + 1, more, needed
        if end == first:
            return None, 0.0
        job.issued += end - first
        heads = HeadRange(first, end, len(job.work.fits))
        return replace(self._slice(job, heads), measures=measures, work=work), seconds

    def whole(self, job: Job, on_policy: OnPolicy) -> FitSlice:
        """The one slice of a fit that takes place in this step's forward pass."""
        job.issued += job.to_send
        every = len(job.work.fits)
        return replace(self._slice(job, HeadRange(0, every, every)), on_policy=on_policy)

    def _slice(self, job: Job, heads: HeadRange) -> FitSlice:
        return FitSlice(
            job.job_id,
            job.request.request_id,
            job.segment,
            job.source_block_ids,
            job.queries.slots,
            job.queries.shifts,
            self._config.method,
            heads,
            random_queries=job.queries.drawn,
            merges=job.merges,
        )

    def note(self, report: FitReport | SliceReport) -> None:
        """What the workers say of a job; one that was cancelled meanwhile is nobody's."""
        job = next((j for j in self.all if j.job_id == report.job_id), None)
        if isinstance(report, FitReport):
            if job is not None:
                job.report = report
            return
        self._pace.note(report)
        self._sent.pop((report.job_id, report.measures, report.heads), None)
        if job is not None and report.slots is not None:
            tokens = len(job.source_block_ids) * self._limits.block_size
            slots = job.segment.slots
            job.work = self._pace.work(job.queries.positions, tokens, slots, report.slots)

    def take_reported(self) -> Iterator[tuple[Job, FitReport]]:
        """The jobs that are over; their targets are still reserved."""
        for job in self.all:
            if job.report is not None:
                if self.is_detached(job):
                    del self.detached[job.job_id]
                else:
                    del self.running[job.request.request_id]
                self._pool.release(job.queries.slots_read)
                self._forget_slices(job)
                yield job, job.report

    def is_detached(self, job: Job) -> bool:
        """Whether its request has ended."""
        return job.job_id in self._blocks.detached

    def request_goes(self, request: Request) -> None:
        """Its compaction goes on where others want it; else what was reserved goes back.

        Not that of a preempted one: the pool is full, and the sequence comes back.
        """
        job = self.running.pop(request.request_id, None)
        if job is None:
            return
        if job.wanted and request.is_finished():
            self._blocks.detach(job.job_id, request.request_id, job.segment)
            self.detached[job.job_id] = job
            return
        self._blocks.release_target(job.job_id)
        self._forget(job)

    def cancel_detached(self) -> None:
        """All of them: what they hold is needed now."""
        for job_id, job in list(self.detached.items()):
            del self.detached[job_id]
            self._blocks.release_detached(job_id)
            self._forget(job)

    def _forget_slices(self, job: Job) -> None:
        for name in [name for name in self._sent if name[0] == job.job_id]:
            del self._sent[name]

    def _forget(self, job: Job) -> None:
        self._pool.release(job.queries.slots_read)
        self._forget_slices(job)
        self._cancelled.append(job.job_id)

    def take_cancelled(self) -> list[int]:
        """What the workers have to be told of since the last time."""
        cancelled, self._cancelled = self._cancelled, []
        return cancelled
