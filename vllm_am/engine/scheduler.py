"""Compaction inside vLLM's scheduler: plan, send the work, see the report, swap the blocks.

vLLM symbols touched (subclassed, selected through ``scheduler_config.scheduler_cls``):
``v1.core.sched.scheduler.Scheduler`` and ``v1.core.sched.async_scheduler.AsyncScheduler``, their
``schedule``, ``update_from_output``, ``make_stats``, ``_get_local_prefix_cache_hit``,
``_preempt_request``, ``_free_request_blocks``, ``_request_blocks_can_be_freed``; and
``grammar_compile_error_reqs``, to which requests are added.

A compaction takes three steps of the engine, in which the sequence goes on as before (with a query
source that needs reference passes, those come first: reference_pass.py):

1. *plan*: blocks for the compacted span are reserved; the fit is sent to the workers, cut into
   slices of layers when it is long;
2. *report*: the workers say whether the fit succeeded on every rank, and its held-out error;
3. *commit*: the segment takes the place of its tokens' blocks, and those return to the pool in
   time for the same step's allocations. A failed fit only returns the reserved blocks.

A merge of a sequence's segments (``merge_slots``) takes the same steps, with the segments for a
source.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_am.config import CONFIG_KEY, PASS_SOURCES, CompactionConfig, RequestOverrides
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.messages import (
    REPORTS_ATTRIBUTE,
    STEP_ATTRIBUTE,
    TOO_LOSSY,
    Activation,
    CompactionStep,
    FitReport,
    FitSlice,
    OnPolicy,
    QuerySample,
    RandomQueries,
    Segment,
)
from vllm_am.engine.metrics import CompactionStats
from vllm_am.engine.planner import SequenceView, Span, ceil_div
from vllm_am.engine.query_pool import Owner, QueryPool
from vllm_am.engine.query_sources import QUERIES_PER_SLOT, select, shifts_behind, thin
from vllm_am.engine.reference_pass import ReferencePassMixin
from vllm_am.engine.spec import CompactingManager

logger = init_logger("vllm.kv_compaction")

#: Positions at the end of a prompt that are always sampled: the question, where there is one.
PROMPT_TAIL_POSITIONS = 64

#: Sampled positions that random queries take their size from.
RANDOM_LIKE_POSITIONS = 256


@dataclass
class Job:
    """A compaction under way."""

    job_id: int
    request: Request
    segment: Segment
    source_block_ids: tuple[int, ...]
    parts: int
    slice_work: int
    """Work of one part (see ``EngineLimits.work``)."""
    query_slots: np.ndarray
    """int64 [n]: slots of the query pool. The same ones in every slice: what is measured in one
    step is fitted in a later one."""
    query_shifts: np.ndarray
    """int64 [n]: see ``FitSlice``."""
    random_queries: RandomQueries | None
    merges: bool = False
    """The source is all segments of the sequence, not tokens."""
    issued: int = 0
    report: FitReport | None = None

    @property
    def slots_read(self) -> np.ndarray:
        """int64: every slot of the query pool that a slice reads."""
        like = [] if self.random_queries is None else [self.random_queries.like]
        return np.concatenate([self.query_slots, *like])


@dataclass
class SequenceOptions:
    """What compaction keeps per request while it is known to the scheduler."""

    enabled: bool
    ratio: float
    threshold_tokens: int | None
    sample_rate: float
    """Share of the token positions whose queries are kept."""
    not_before: int = 0
    """After a failed fit: tokens that must have been computed before it is tried again."""
    unmerged_end: int = 0
    """After a failed merge: end of its segments. It is tried again when there is another one."""
    outgrew: int = 0
    """How often it needed more than the whole pool because a fit had failed."""


@dataclass
class CompactionState:
    """The scheduler's compaction state, in one place."""

    jobs: dict[str, Job] = field(default_factory=dict)
    options: dict[str, SequenceOptions] = field(default_factory=dict)
    stats: CompactionStats = field(default_factory=CompactionStats)
    totals: CompactionStats = field(default_factory=CompactionStats)
    next_job_id: int = 0
    hold_preemption: bool = False
    warned_of_few_queries: bool = False


def _keeper(request_id: str) -> Owner:
    """Who owns the kept queries of a sequence's compacted tokens in the query pool."""
    return (request_id, 0)


class CompactionSchedulerMixin(ReferencePassMixin):
    """Adds compaction to a vLLM scheduler class; see the module docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compaction_config = CompactionConfig.from_dict(
            self.vllm_config.additional_config[CONFIG_KEY]
        )
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or not isinstance(managers[0], CompactingManager):
            raise NotImplementedError(
                "--kv-compaction: every attention layer of the model must be a full-attention "
                "layer served by the compacting manager; this model has "
                f"{[type(m.kv_cache_spec).__name__ for m in managers]}"
            )
        self.compacting_manager: CompactingManager = managers[0]
        pool = self.kv_cache_manager.block_pool
        limits = EngineLimits.from_vllm_config(self.vllm_config)
        self.compaction_limits = limits
        self.planner = limits.planner(pool.num_gpu_blocks - 1)
        self.query_pool = QueryPool(
            capacity=limits.query_pool_positions(pool.num_gpu_blocks),
            block_size=limits.block_size,
            max_positions=self.max_model_len + self.num_lookahead_tokens + 1,
            is_live=lambda block_id: pool.blocks[block_id].ref_cnt > 0,
        )
        self.compaction = CompactionState()

    # -- one engine step ------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        step = CompactionStep()
        self._commit_reported(step)
        self._start_jobs()
        step.fits.extend(self._issue_slices())
        # While blocks are about to come back, wait for them rather than throw a sequence out.
        self.compaction.hold_preemption = bool(self.compaction.jobs)
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.compaction.hold_preemption = False
        # A request preempted in this very step lost its compacted state and its jobs again.
        step.activations = [
            a for a in step.activations if a.request_id in self.compacting_manager.compacted
        ]
        step.fits = [f for f in step.fits if f.request_id in self.compaction.jobs]
        step.shared = self.shared_prefixes(output)
        self._sample_queries(output, step)
        step.fits.extend(self._fits_on_policy(output))
        if step:
            setattr(output, STEP_ATTRIBUTE, step)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        for report in getattr(model_runner_output, REPORTS_ATTRIBUTE, ()):
            for job in self.compaction.jobs.values():
                if job.job_id == report.job_id:
                    job.report = report
        return super().update_from_output(scheduler_output, model_runner_output)

    # -- plan -----------------------------------------------------------------------------------

    def _start_jobs(self) -> None:
        """Reserve blocks for what is due, as much as one step's work bound admits."""
        jobs = self.compaction.jobs.values()
        outstanding = sum(job.slice_work * (job.parts - job.issued) for job in jobs)
        # Merges first: a sequence over its limit gets no further segment.
        due = itertools.chain(self._merges_due(), self._spans_due())
        while outstanding < self.compaction_limits.step_work:
            span, merges = next(due, (None, False))
            if span is None:
                break
            if (job := self._start_job(span, merges)) is not None:
                outstanding += job.slice_work * job.parts

    def _merges_due(self) -> Iterator[tuple[Span, bool]]:
        """Sequences whose segments have outgrown ``merge_slots``; not while passes read them."""
        for request in self.running:
            request_id = request.request_id
            if request_id in self.compaction.jobs or request_id in self.studies:
                continue
            segments = self.compacting_manager.segments(request_id)
            if not segments:
                continue
            options = self._options(request)
            if not options.enabled or segments[-1].end <= options.unmerged_end:
                continue
            slots = sum(s.slots for s in segments)
            blocks = self.planner.merged_blocks(slots, sum(len(s.block_ids) for s in segments))
            if blocks is not None:
                slots = blocks * self.compaction_limits.block_size
                yield Span(request_id, segments[0].start, segments[-1].end, slots), True

    def _spans_due(self) -> Iterator[tuple[Span, bool]]:
        views = {r.request_id: v for r in self.running if (v := self._view(r)) is not None}
        if not views:
            return
        coming = sum(len(job.source_block_ids) for job in self.compaction.jobs.values())
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        for due in self.planner.spans(views.values(), free, coming):
            span = self._after_passes(views[due.request_id], due)
            if span is not None:
                yield span, False

    def _after_passes(self, view: SequenceView, due: Span) -> Span | None:
        """What of the span can be compacted now: None while its reference passes run.

        The passes saw the sequence up to a point, and so do their queries: what came later has to
        wait for the next compaction. A prompt is compacted before its prefill is complete only
        because the pool cannot hold it: no time for passes then, and no room.
        """
        if not self.compaction_config.pass_fraction:
            return due
        study = self.studies.get(due.request_id)
        if study is None:
            request = self.requests[due.request_id]
            if view.computed < view.prompt or request.prompt_token_ids is None:
                return due
            study = self.begin_study(request, due)
        if not study.over:
            return None
        if due.end <= study.end:
            return due
        seen = replace(view, computed=study.end + self.compaction_config.recent_tokens)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return self.planner.next_span(seen, free)

    def _fits_on_policy(self, output: SchedulerOutput) -> Iterator[FitSlice]:
        """The fits that take place in the forward pass of this step, whose passes are read there.

        One that finds no room after all comes later, when the passes have left their queries.
        """
        for study in self.studies.values():
            passes = self.read_in_step(study, output)
            if not passes:
                continue
            measured = self._reference_slots(study.span)
            job = self._start_job(study.span, merges=False, passes=passes)
            if job is not None:
                job.issued = job.parts
                shifts = self._shifts(measured, study.span)
                on_policy = OnPolicy(passes, measured, shifts)
                yield replace(self._slice(job), part=0, parts=1, on_policy=on_policy)

    def _start_job(self, span: Span, merges: bool, passes: Sequence[str] = ()) -> Job | None:
        """Reserve the target and decide on the queries.

        Args:
            merges: the span is all that was compacted before.
            passes: on-policy, those of this step.
        """
        query_slots = self._reference_slots(span, passes)
        random_queries = self._random_queries(span)
        if not self.query_pool.can_hold(len(query_slots)):
            return None
        manager = self.compacting_manager
        reserve = manager.reserve_merge if merges else manager.reserve_target
        reserved = reserve(self.compaction.next_job_id, span)
        if reserved is None:
            return None
        segment, source = reserved
        self.query_pool.forget(segment.block_ids)
        limits = self.compaction_limits
        work = limits.work(len(source) * limits.block_size, span.slots)
        parts = min(limits.num_layers, ceil_div(work, limits.step_work))
        if not merges:
            self._count_shortfall(span, on_policy=bool(passes))
        self._warn_of_few_queries(span, query_slots, random_queries)
        # Global budgets: all layers are measured before any of them is fitted.
        rounds = 2 if self.compaction_config.budgets == "global" else 1
        parts *= rounds
        job = Job(
            self.compaction.next_job_id,
            self.requests[span.request_id],
            segment,
            source,
            parts,
            slice_work=ceil_div(work * rounds, parts),
            query_slots=query_slots,
            query_shifts=self._shifts(query_slots, span),
            random_queries=random_queries,
            merges=merges,
        )
        self.query_pool.hold(job.slots_read)
        self.compaction.next_job_id += 1
        self.compaction.jobs[span.request_id] = job
        return job

    def _count_shortfall(self, span: Span, on_policy: bool) -> None:
        """Count a fit without the passes it should have, or not in the middle of them."""
        study = self.studies.get(span.request_id)
        missing = self.compaction_config.pass_fraction and (study is None or study.cut_short)
        if missing or on_policy != self.compaction_config.on_policy:
            self._count(CompactionStats(reference_shortfalls=1))

    def _warn_of_few_queries(
        self, span: Span, slots: np.ndarray, drawn: RandomQueries | None
    ) -> None:
        """Once."""
        positions = len(slots) + (drawn.positions if drawn else 0)
        queries = positions * self.compaction_limits.queries_per_kv
        needed = QUERIES_PER_SLOT * span.slots
        lossy = span.slots < span.end - span.start
        if lossy and queries < needed and not self.compaction.warned_of_few_queries:
            self.compaction.warned_of_few_queries = True
            logger.warning(
                "KV compaction: request %s: %d reference queries per KV head for %d slots, and at "
                "least %d are advisable: raise reference_queries or query_pool_share in "
                "--kv-compaction-config, or mix in another source (not said again)",
                span.request_id,
                queries,
                span.slots,
                needed,
            )

    def _view(self, request: Request) -> SequenceView | None:
        if request.request_id in self.passes:
            return None
        options = self._options(request)
        if not options.enabled or request.request_id in self.compaction.jobs:
            return None
        # Certain tokens only: not the placeholders of async scheduling, nor unverified drafts.
        computed = (
            request.num_computed_tokens - request.num_output_placeholders - self.num_spec_tokens
        )
        if computed < options.not_before:
            return None
        segments = self.compacting_manager.segments(request.request_id)
        protected = self.compaction_limits.protected_tokens
        end = segments[-1].end if segments else protected
        return SequenceView(
            request.request_id,
            computed=computed,
            prompt=request.num_prompt_tokens,
            compacted_end=end,
            exact_tokens=computed - end + protected,
            ratio=options.ratio,
            threshold_tokens=options.threshold_tokens,
        )

    def _options(self, request: Request) -> SequenceOptions:
        options = self.compaction.options.get(request.request_id)
        if options is None:
            params = request.sampling_params
            overrides = RequestOverrides.from_extra_args(params.extra_args if params else None)
            threshold = overrides.threshold_tokens or self.planner.threshold.tokens
            options = SequenceOptions(
                enabled=overrides.enabled,
                ratio=overrides.ratio or self.compaction_config.ratio,
                threshold_tokens=threshold,
                sample_rate=self.compaction_limits.sample_rate(
                    max(request.num_prompt_tokens, threshold or 0)
                ),
            )
            self.compaction.options[request.request_id] = options
        return options

    # -- send the work --------------------------------------------------------------------------

    def _issue_slices(self) -> Iterator[FitSlice]:
        """The next slices, oldest job first, within the work bound of one step (one at least)."""
        budget = self.compaction_limits.step_work
        for job in self.compaction.jobs.values():
            while job.issued < job.parts and budget > 0:
                budget -= job.slice_work
                yield self._slice(job)
                job.issued += 1

    def _slice(self, job: Job) -> FitSlice:
        """The next one."""
        return FitSlice(
            job.job_id,
            job.request.request_id,
            job.segment,
            job.source_block_ids,
            job.query_slots,
            job.query_shifts,
            self.compaction_config.method,
            part=job.issued,
            parts=job.parts,
            random_queries=job.random_queries,
            merges=job.merges,
        )

    def _shifts(self, slots: np.ndarray, span: Span) -> np.ndarray:
        """int64 [n]: by how much each of the sampled queries is moved."""
        if not self.compaction_config.rotates_context:
            return np.zeros_like(slots)
        return shifts_behind(self.query_pool.positions[slots], span.end)

    def _reference_slots(self, span: Span, passes: Sequence[str] = ()) -> np.ndarray:
        """Sampled positions of all sources, in the proportions of the mixture.

        Args:
            passes: on-policy, those that are read in this step: no others then.
        """
        study = self.studies.get(span.request_id)
        owners = {} if study is None else study.owners
        if study is not None and passes:
            owners = self.owners_of_passes(study, passes)
        found = {source: self.query_pool.slots(of) for source, of in owners.items()}
        found["context"] = self._context_slots(span)
        due = set(self.compaction_config.query_fractions) & set(PASS_SOURCES)
        return select(
            found,
            self.compaction_config.query_fractions,
            self.compaction_limits.sample_positions,
            keep_last=PROMPT_TAIL_POSITIONS,
            cut_short=not due <= set(owners) or (study is not None and study.cut_short),
        )

    def _context_slots(self, span: Span) -> np.ndarray:
        """All queries sampled so far at or after the start of the span."""
        blocks = self.compacting_manager.req_to_blocks[span.request_id]
        first = span.start // self.compaction_limits.block_size
        owners = [_keeper(span.request_id), *(b.block_id for b in blocks[first:])]
        slots = self.query_pool.slots(owners)
        return slots[self.query_pool.positions[slots] >= span.start]

    def _random_queries(self, span: Span) -> RandomQueries | None:
        """The random part of the mixture, like the queries of the sequence itself."""
        fraction = self.compaction_config.query_fractions.get("random")
        if fraction is None:
            return None
        positions = max(1, round(fraction * self.compaction_limits.sample_positions))
        return RandomQueries(positions, thin(self._context_slots(span), RANDOM_LIKE_POSITIONS))

    def _sample_queries(self, output: SchedulerOutput, step: CompactionStep) -> None:
        """Choose which queries of this step are kept, after blocks that changed hands forgot."""
        size = self.compaction_limits.block_size
        for new in output.scheduled_new_reqs:
            self.query_pool.forget(new.block_ids[0][new.num_computed_tokens // size :])
        cached = output.scheduled_cached_reqs
        for request_id, ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if ids is not None:
                fresh = computed // size if request_id in cached.resumed_req_ids else 0
                self.query_pool.forget(ids[0][fresh:])
        sampling = {r: self._sampling(self.requests[r]) for r in output.num_scheduled_tokens}
        ends = {r: self.requests[r].num_computed_tokens for r in sampling}
        wanted = 0.0
        for request_id, (rate, always_from, _) in sampling.items():
            count = output.num_scheduled_tokens[request_id]
            tail = min(count, max(0, ends[request_id] - always_from))
            wanted += rate * (count - tail) + tail
        self.query_pool.begin_step(wanted)
        for request_id, (rate, always_from, owner_of) in sampling.items():
            count = output.num_scheduled_tokens[request_id]
            start = ends[request_id] - count
            offsets, slots = self.query_pool.sample(owner_of, start, count, rate, always_from)
            if len(slots):
                step.samples[request_id] = QuerySample(offsets, slots)

    def _sampling(self, request: Request) -> tuple[float, int, Callable[[int], Owner]]:
        """Rate, first position that is always kept, owner by block index.

        Also of requests that will not be compacted: their blocks may be another's prefix.
        """
        if request.request_id in self.passes:
            rate, owner_of = self.sampling_of_pass(request.request_id)
            return rate, sys.maxsize, owner_of
        blocks = self.compacting_manager.req_to_blocks[request.request_id]
        reads_prompt = request.num_computed_tokens <= request.num_prompt_tokens
        tail = max(0, request.num_prompt_tokens - PROMPT_TAIL_POSITIONS)
        return (
            self._options(request).sample_rate,
            tail if reads_prompt else sys.maxsize,
            lambda index: blocks[index].block_id,
        )

    # -- see the report, swap the blocks --------------------------------------------------------

    def _commit_reported(self, step: CompactionStep) -> None:
        for request_id, job in list(self.compaction.jobs.items()):
            if job.report is None:
                continue
            del self.compaction.jobs[request_id]
            self.query_pool.release(job.slots_read)
            self.end_study(request_id)
            if job.report.failure is None:
                commit = self._commit_merge if job.merges else self._commit
                commit(job, job.report)
                step.activations.append(
                    Activation(request_id, job.job_id, job.segment, replaces=job.merges)
                )
            else:
                self._give_up(job, job.report.failure)

    def _commit(self, job: Job, report: FitReport) -> None:
        request_id, segment = job.request.request_id, job.segment
        pool = self.kv_cache_manager.block_pool
        held = self.compacting_manager.held_blocks(request_id)
        free = pool.get_num_free_blocks()
        if self.compaction_config.merge_slots is not None:
            self._keep_queries(job)
        self.compacting_manager.commit(job.job_id, request_id, segment)
        tokens = segment.end - segment.start
        freed = held - self.compacting_manager.held_blocks(request_id)
        returned = pool.get_num_free_blocks() - free
        self._count(
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
            request_id,
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

    def _keep_queries(self, job: Job) -> None:
        """For merges to come: the blocks that hold the sampled tokens are about to go."""
        keeper = _keeper(job.request.request_id)
        most = self.compaction_limits.sample_positions
        self.query_pool.keep(job.source_block_ids, keeper, most)

    def _commit_merge(self, job: Job, report: FitReport) -> None:
        request_id, segment = job.request.request_id, job.segment
        segments = self.compacting_manager.segments(request_id)
        self.compacting_manager.commit_merge(job.job_id, request_id, segment)
        freed = len(job.source_block_ids) - len(segment.block_ids)
        self._count(
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
            request_id,
            segment.start,
            segment.end,
            len(segments),
            sum(s.slots for s in segments),
            segment.slots,
            freed,
            1e3 * report.seconds,
            report.output_error,
            report.mass_error,
        )

    def _give_up(self, job: Job, reason: str) -> None:
        """The sequence stays as it is; tried again once it has grown."""
        self.compacting_manager.release_target(job.job_id)
        options = self._options(job.request)
        if job.merges:
            options.unmerged_end = job.segment.end
        elif reason == TOO_LOSSY:
            self._keep_more(job, options)
            return
        else:
            options.not_before = job.request.num_computed_tokens + max(
                self.planner.min_span_tokens, job.segment.end - job.segment.start
            )
        # Loud once for each reason; the metric counts them all.
        log = logger.debug if reason in self.compaction.totals.failures else logger.warning
        self._count(CompactionStats(failures={reason: 1}))
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

    def _keep_more(self, job: Job, options: SequenceOptions) -> None:
        """The error bound was exceeded: twice the slots from now on, or no compaction at all."""
        assert job.report is not None
        options.ratio *= 2
        options.enabled = options.ratio < 1
        self._count(CompactionStats(failures={TOO_LOSSY: 1}))
        logger.info(
            "KV compaction: request %s, tokens [%d, %d): held-out output error %.3f with %d slots "
            "per head is above max_error %g; %s",
            job.request.request_id,
            job.segment.start,
            job.segment.end,
            job.report.output_error,
            job.segment.slots,
            self.compaction_config.max_error,
            "tried again with twice as many" if options.enabled else "the sequence stays exact",
        )

    # -- life and death of requests -------------------------------------------------------------

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        """A hit that leaves no room for the rest of the sequence is cut short."""
        blocks, tokens, *others = super()._get_local_prefix_cache_hit(request)
        options = self._options(request)
        if tokens and options.enabled:
            most = self.planner.longest_hit(request.num_tokens, options.ratio)
            if most < tokens:
                blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, most)
                tokens = most
        return blocks, tokens, *others

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """Counts sequences that outgrow the pool all by themselves because a fit failed.

        The pool may be smaller than ``max_model_len``, so such a sequence cannot go on. It is
        computed anew once, as a fit may fail for a passing lack of memory; the second time it is
        finished with an error, or it might be computed for ever.
        """
        options = self.compaction.options.get(request.request_id)
        alone = all(other.request_id in self.passes for other in self.running)
        # vLLM drops stale output where it preempts everybody, to reset the prefix cache.
        if options is not None and options.not_before and alone and not drop_stale_output:
            options.outgrew += 1
            if options.outgrew > 1:
                self._finish_unservable(request)
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _finish_unservable(self, request: Request) -> None:
        logger.error(
            "KV compaction: request %s is finished with an error: the KV pool (%d tokens) cannot "
            "hold its %d tokens uncompacted, and its fits failed (for the reasons logged above and "
            "counted in vllm:kv_compaction_failures)",
            request.request_id,
            self.planner.num_blocks * self.planner.block_size,
            request.num_tokens,
        )
        # The set that ``update_from_output`` finishes in this way, with an output for the client;
        # requests get into it for other reasons, too.
        self.grammar_compile_error_reqs.add(request.request_id)

    def _free_request_blocks(self, request: Request) -> None:
        """Finish, abort and preemption: a compaction under way ends, its blocks go back."""
        job = self.compaction.jobs.pop(request.request_id, None)
        if job is not None:
            self.query_pool.release(job.slots_read)
            self.compacting_manager.release_target(job.job_id)
        options = self.compaction.options.pop(request.request_id, None)
        if options is not None and not request.is_finished():  # it will be computed anew
            anew = replace(options, not_before=0, unmerged_end=0)
            self.compaction.options[request.request_id] = anew
        self.query_pool.forget([_keeper(request.request_id)])
        holding, self.compaction.hold_preemption = self.compaction.hold_preemption, False
        try:
            super()._free_request_blocks(request)
        finally:
            self.compaction.hold_preemption = holding

    def _request_blocks_can_be_freed(self, request: Request) -> bool:
        """Asked by ``schedule`` before it preempts: "not now" makes it wait a step instead."""
        if self.compaction.hold_preemption and request.request_id not in self.passes:
            return False
        can_be_freed: bool = super()._request_blocks_can_be_freed(request)
        return can_be_freed

    # -- metrics and checks ---------------------------------------------------------------------

    def _count(self, stats: CompactionStats) -> None:
        self.compaction.totals.add(stats)
        self.compaction.totals.forget_old_observations()
        if self.log_stats:  # else nobody would ever collect them
            self.compaction.stats.add(stats)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        if self.reference_tokens:
            self._count(CompactionStats(reference_tokens=self.reference_tokens))
            self.reference_tokens = 0
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self.compaction.stats:
            self.compaction.stats.attach(stats)
            self.compaction.stats = CompactionStats()
        return stats

    def check_compaction(self) -> None:
        """Exact ownership of every block and every query slot (debugging, tests).

        Raises:
            AssertionError: naming what does not add up.
        """
        deferred: deque[tuple[int, list[Any]]] = self.deferred_frees
        self.compacting_manager.check(blocks for _, blocks in deferred)
        self.query_pool.check()
        self.check_passes()
        if set(self.compaction.jobs) - {r.request_id for r in self.running}:
            raise AssertionError("a compaction runs for a request that does not")
        if len(self.compacting_manager.targets) != len(self.compaction.jobs):
            raise AssertionError("targets and jobs differ")


class CompactionScheduler(CompactionSchedulerMixin, Scheduler):
    """vLLM's scheduler with compaction."""


class CompactionAsyncScheduler(CompactionSchedulerMixin, AsyncScheduler):
    """vLLM's async scheduler with compaction."""
