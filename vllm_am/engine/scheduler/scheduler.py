"""Compaction inside vLLM's scheduler: what happens in one engine step, in order.

vLLM symbols touched (subclassed, selected through ``scheduler_config.scheduler_cls``):
``v1.core.sched.scheduler.Scheduler`` and ``v1.core.sched.async_scheduler.AsyncScheduler``, their
``add_request``, ``schedule``, ``update_from_output``, ``make_stats``,
``_get_local_prefix_cache_hit``, ``_preempt_request``, ``_free_request_blocks``,
``_request_blocks_can_be_freed``, ``has_requests``, ``reset_prefix_cache``; ``waiting``, whose first
request is looked at, and ``grammar_compile_error_reqs``, to which requests are added.

A compaction takes three steps of the engine, in which the sequence goes on as before (with a query
source that needs reference passes, those come first: reference_pass.py):

1. *plan* (planner.py, jobs.py): blocks for the compacted span are reserved; the fit is sent to the
   workers, cut into slices of heads, as many per step as step_ms allows (pace.py);
2. *report*: the workers say whether the fit succeeded on every rank, and its held-out error;
3. *commit* (commit.py): the segment takes the place of its tokens' blocks, and those return to the
   pool in time for the same step's allocations. A failed fit only returns the reserved blocks
   (give_up.py).

A merge of a sequence's segments (``merge_slots``) takes the same steps, with the segments for a
source.

Segments are published as they are committed (compact_cache.py): a request whose text begins with
some begins life on them, and a sequence that is due takes one over in place of a fit (sharing.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.outputs import RequestError
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_am.engine.messages import (
    REPORTS_ATTRIBUTE,
    STEP_ATTRIBUTE,
    CompactionStep,
    FitSlice,
    FitTime,
    OnPolicy,
    PartReport,
    Segment,
)
from vllm_am.engine.scheduler import prefix_commands
from vllm_am.engine.scheduler.jobs import Job
from vllm_am.engine.scheduler.planner import SequenceView, Span
from vllm_am.engine.scheduler.reference_pass import ReferencePassMixin
from vllm_am.engine.scheduler.reference_queries import JobQueries
from vllm_am.engine.scheduler.state import CompactionState
from vllm_am.engine.stats import CompactionStats
from vllm_am.engine.versions import note_error


class CompactionSchedulerMixin(ReferencePassMixin):
    """Adds compaction to a vLLM scheduler class; see the module docstring."""

    _holds_preemption = False
    """While blocks are about to come back: wait for them rather than throw a sequence out."""
    _held_preemption = False
    """It did, in the last step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compaction = CompactionState.of(self)
        prefix_commands.install()

    # -- one engine step ------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        step = CompactionStep()
        self.compaction.commands.preload()
        self._settle_reported(step)
        self.compaction.pace.begin_step(time.perf_counter())
        self.compaction.pace.pressed = self._somebody_waits()
        self.compaction.pace.alone = not self.running
        self._start_jobs()
        step.fits.extend(self.compaction.jobs.slices())
        if self.compaction.jobs.all:
            step.fit_seconds = self.compaction.pace.step_seconds
            if self.compaction.pace.pressed:
                self.compaction.journal.count(CompactionStats(pressed_steps=1))
        self._holds_preemption = bool(self.compaction.jobs.all)
        self._held_preemption = False
        try:
            with self.compaction.admission.limited(self):
                output = super().schedule(*args, **kwargs)
        finally:
            self._holds_preemption = False
        self._drop_preempted(step)
        self._tell_of_entries(step, output)
        step.shared = self.shared_prefixes(output)
        step.samples = self._sample_queries(output)
        step.fits.extend(self._fits_on_policy(output))
        if step:
            setattr(output, STEP_ATTRIBUTE, step)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        for report in getattr(model_runner_output, REPORTS_ATTRIBUTE, ()):
            if isinstance(report, PartReport):
                self.compaction.transfers.note(report)
            elif isinstance(report, FitTime):
                self.compaction.pace.note_fits(report.seconds)
                self.compaction.journal.count(CompactionStats(step_seconds=[report.seconds]))
            else:
                self.compaction.jobs.note(report)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self.running:
            self.compaction.pace.end_steps()
        return outputs

    def _somebody_waits(self) -> bool:
        """For blocks, which compactions under way would give: then they may take longer steps."""
        if self._held_preemption or self.compaction.admission.waits:
            return True
        if not self.waiting or len(self.running) >= self.max_num_running_reqs:
            return False
        request = self.waiting.peek_request()
        free = self.compaction.blocks.block_pool.get_num_free_blocks()
        needed = self.compaction.planner.blocks_to_grow(request.num_tokens)
        return bool(request.request_id not in self.passes and needed > free)

    def _settle_reported(self, step: CompactionStep) -> None:
        """Commit what succeeded, give up what failed."""
        for job, report in self.compaction.jobs.take_reported():
            if not self.compaction.jobs.is_detached(job):
                self.end_study(job.request.request_id)
            if report.failure is None:
                self.compaction.commits.commit(job, report, step)
            else:
                self.compaction.failures.give_up(job, report)

    def _start_jobs(self) -> None:
        """Start what is due, as much as one step has time for.

        What has been compacted for another sequence is taken over, which costs nothing; what is
        being compacted for another is waited for.
        """
        jobs, shares = self.compaction.jobs, self.compaction.limits.caches_prefixes
        for span, view in self._due():
            if shares and view is not None and self._is_shared(span, view.computed):
                continue
            if jobs.outstanding_seconds < self.compaction.pace.step_seconds:
                request = self.requests[span.request_id]
                if view is not None and self.compaction.failures.lacks_queries(request, span, view):
                    continue
                after = span if view is None else self.after_passes(view, span)
                if after is not None:
                    self._start_job(after, merges=view is None)
            elif not shares:
                break

    def _is_shared(self, span: Span, computed: int) -> bool:
        """Whether its sequence needs no fit now: it has taken over an entry, or one is coming."""
        request, sharing = self.requests[span.request_id], self.compaction.sharing
        if span.request_id in self.studies:  # it leads, and others wait for it
            return False
        if sharing.adopt(request, computed):
            return True
        coming: list[tuple[BlockHash | None, Span | Segment]] = [
            (job.key, job.segment) for job in self.compaction.jobs.all
        ]
        for study in self.studies.values():
            if not study.cut_short:
                coming.append((sharing.key(study.parent, study.span), study.span))
        return sharing.coming(request, span, computed, coming)

    def _tell_of_entries(self, step: CompactionStep, output: SchedulerOutput) -> None:
        """What the workers have to know of segments that outlive their requests."""
        compaction = self.compaction
        step.attached = compaction.blocks.take_attached()
        step.dropped = compaction.blocks.cache.sweep()
        compaction.journal.evicted(len(step.dropped))
        compaction.transfers.send(step)
        new = {new.req_id for new in output.scheduled_new_reqs}
        new |= set(output.scheduled_cached_reqs.resumed_req_ids)
        compaction.sharing.count(self.requests[r] for r in new - self.passes.keys())

    def _drop_preempted(self, step: CompactionStep) -> None:
        """A request preempted in this very step lost its compacted state and its jobs again."""
        compacted, jobs = self.compaction.blocks.compacted, self.compaction.jobs
        step.activations = [a for a in step.activations if a.request_id in compacted]
        under_way = {job.job_id for job in jobs.all}
        step.fits = [f for f in step.fits if f.job_id in under_way]
        step.cancelled += jobs.take_cancelled()

    def _sample_queries(self, output: SchedulerOutput) -> dict[str, Any]:
        """Choose which queries of this step are kept, after blocks that changed hands forgot."""
        self.compaction.queries.forget_handed_out(output)
        wanted = {}
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            if request_id in self.passes:
                wanted[request_id] = self.sampling_of_pass(request, count)
            else:
                sequences = self.compaction.sequences
                rate, use_of = sequences.options(request).sample_rate, sequences.use_of_queries
                wanted[request_id] = self.compaction.queries.sampling(request, count, rate, use_of)
        return self.compaction.queries.sample(wanted)

    def _fits_on_policy(self, output: SchedulerOutput) -> Iterator[FitSlice]:
        """The fits that take place in the forward pass of this step, whose passes are read there.

        One that finds no room after all comes later, when the passes have left their queries.
        """
        for study in self.studies.values():
            passes = self.read_in_step(study, output)
            if not passes:
                continue
            measured = self._choose_queries(study.span, self._key(study.span, passes))
            job = self._start_job(study.span, merges=False, passes=passes)
            if job is not None:
                on_policy = OnPolicy(passes, measured.slots, measured.shifts)
                yield self.compaction.jobs.whole(job, on_policy)

    # -- what is due, and from which queries ----------------------------------------------------

    def _due(self) -> Iterator[tuple[Span, SequenceView | None]]:
        """Spans to compact now, of which sequences; None for a merge of what was compacted before.

        Merges first: a sequence over its limit gets no further segment; not while passes read it.
        """
        compaction = self.compaction
        for request in self.running:
            if request.request_id in self.studies or not self._is_free(request):
                continue
            if span := compaction.sequences.merge_due(request):
                yield span, None
        views: dict[str, SequenceView] = {}
        for request in self.running:
            if self._is_free(request) and (view := compaction.sequences.view(request)):
                views[request.request_id] = view
        if not views:
            return
        free = compaction.blocks.block_pool.get_num_free_blocks()
        coming, waits = compaction.jobs.coming_blocks, compaction.admission.waits
        for due in compaction.planner.spans(views.values(), free, coming, waits):
            yield due, views[due.request_id]

    def _is_free(self, request: Request) -> bool:
        """A user's, and no compaction of it is under way."""
        request_id = request.request_id
        return request_id not in self.passes and request_id not in self.compaction.jobs.running

    def _choose_queries(
        self, span: Span, key: BlockHash | None, passes: Sequence[str] = ()
    ) -> JobQueries:
        """Reference queries for a span.

        Args:
            key: what it is going to be published under, if it is.
            passes: on-policy, those that are read in this step: no others then.
        """
        queries, study = self.compaction.queries, self.studies.get(span.request_id)
        options = self.compaction.sequences.options(self.requests[span.request_id])
        rate = None if key is None else options.sample_rate
        if study is None:
            return queries.choose(span, {}, cut_short=False, shared_rate=rate)
        owners = self.owners_of_passes(study, passes) if passes else study.owners
        return queries.choose(span, owners, study.cut_short, shared_rate=rate)

    def _key(self, span: Span, passes: Sequence[str] = ()) -> BlockHash | None:
        """What a span is going to be published under; None where its segment stays private.

        One that is fitted without all of its passes, or of whose queries most are missing (its
        blocks were computed for others, whose queries had to go), is good enough for its own
        sequence only.
        """
        if self.falls_short(span, on_policy=bool(passes)):
            return None
        request = self.requests[span.request_id]
        rate = self.compaction.sequences.options(request).sample_rate
        if not self.compaction.queries.suffice(span, rate):
            return None
        return self.compaction.sharing.key(request, span)

    def _start_job(self, span: Span, merges: bool, passes: Sequence[str] = ()) -> Job | None:
        """Start a compaction, if there is room for it now.

        Args:
            merges: the span is all that was compacted before.
            passes: on-policy, those of this step.
        """
        request = self.requests[span.request_id]
        key = None if merges else self._key(span, passes)
        queries = self._choose_queries(span, key, passes)
        if merges and not queries.positions:  # again when there is another segment
            self.compaction.sequences.options(request).unmerged_end = span.end
            return None
        job = self.compaction.jobs.start(request, span, queries, merges, key)
        if job is not None:
            shortfall = not merges and self.falls_short(span, on_policy=bool(passes))
            self.compaction.journal.started(job, self.compaction.limits.queries_per_kv, shortfall)
        return job

    # -- life and death of requests -------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """One that is wrong in spite of all front ends is finished alone, with an error."""
        super().add_request(request)
        refusal = self.compaction.sequences.options(request).refusal
        if refusal:
            self.compaction.journal.refused(request.request_id, refusal)
            self._finish_with_error(request, RequestError("validation_error", refusal))
        elif request.mm_features:
            self.compaction.journal.count(CompactionStats(media_requests=1))
        self.compaction.sequences.arrived(request)

    def _finish_with_error(self, request: Request, error: RequestError) -> None:
        """At the end of this step or of the next, with an output for the client."""
        # Those that ``update_from_output`` finishes so; requests get there for other reasons.
        note_error(self.grammar_compile_error_reqs, request.request_id, error)

    def _get_local_prefix_cache_hit(
        self, request: Request, *limit: int | None
    ) -> tuple[Any, int, int, bool]:
        """A request begins on compacted prefixes, where there are some.

        A hit that leaves no room for the rest of the sequence is cut short, and so is one of whose
        queries nothing is left, where the sequence is going to be compacted.
        """
        blocks, tokens, *others = super()._get_local_prefix_cache_hit(request, *limit)
        exact = blocks.blocks[self.compaction.blocks.kv_cache_group_id]
        begun = self.compaction.sharing.hit(request, exact)
        if begun is not None:
            blocks = self.kv_cache_manager.create_kv_cache_blocks((begun,))
            return blocks, len(begun) * self.compaction.limits.block_size, *others
        options = self.compaction.sequences.options(request)
        if tokens and options.enabled:
            most = self.compaction.planner.longest_hit(request.num_tokens, options.ratio)
            # By the share of the pool that is in use, it may never be compacted.
            if (
                options.threshold_tokens is not None
                and request.num_tokens > options.threshold_tokens
            ):
                known = self.compaction.queries.blocks_with_queries(
                    exact,
                    options.sample_rate,
                    request.num_prompt_tokens,
                    self.compaction.sequences.use_of_queries(request),
                )
                most = min(most, known * self.compaction.limits.block_size)
            if most < tokens and self.compaction.blocks.others:
                # Asked again, not cut: the others need their window or state where a hit ends.
                coordinator = self.kv_cache_manager.coordinator
                found, tokens, _ = coordinator.find_longest_cache_hit(request.block_hashes, most)
                blocks = self.kv_cache_manager.create_kv_cache_blocks(found)
            elif most < tokens:
                blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, most)
                tokens = most
        return blocks, tokens, *others

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """A sequence that outgrows the pool all by itself is not computed anew for ever."""
        alone = all(other.request_id in self.passes for other in self.running)
        # vLLM drops stale output where it preempts everybody, to reset the prefix cache.
        if alone and not drop_stale_output and self.compaction.failures.outgrows_the_pool(request):
            message = "the KV pool cannot hold the sequence, and it could not be compacted"
            self._finish_with_error(request, RequestError("generation_error", message))
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _free_request_blocks(self, request: Request) -> None:
        """Finish, abort and preemption: a compaction under way ends, or goes on for others."""
        self.compaction.jobs.request_goes(request)
        if self.compaction.sequences.was_too_short(request):
            self.compaction.journal.too_short(request.request_id, request.max_tokens)
        self.compaction.sequences.forget(request)
        self.compaction.queries.forget(request.request_id)
        holding, self._holds_preemption = self._holds_preemption, False
        try:
            super()._free_request_blocks(request)
        finally:
            self._holds_preemption = holding

    def _request_blocks_can_be_freed(self, request: Request) -> bool:
        """Asked by ``schedule`` before it preempts: "not now" makes it wait a step instead."""
        if self._holds_preemption and request.request_id not in self.passes:
            self._held_preemption = True
            return False
        can_be_freed: bool = super()._request_blocks_can_be_freed(request)
        return can_be_freed

    def has_requests(self) -> bool:
        """The engine goes on stepping for compactions whose requests have ended, and for files."""
        compaction = self.compaction
        waits = compaction.jobs.detached or compaction.commands.waits
        return bool(waits) or bool(super().has_requests())

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """vLLM wants all blocks free for it."""
        self.compaction.jobs.cancel_detached()
        self.compaction.transfers.cancel_all()
        for name in self.compaction.names.drop_all():
            self.compaction.journal.prefix_dropped(name)
        return bool(super().reset_prefix_cache(*args, **kwargs))

    # -- metrics and checks ---------------------------------------------------------------------

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        journal = self.compaction.journal
        if self.reference_tokens:
            journal.count(CompactionStats(reference_tokens=self.reference_tokens))
            self.reference_tokens = 0
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            journal.hand_over(stats, self.compaction.holdings())
        return stats

    def check_compaction(self) -> None:
        """Exact ownership of every block and every query slot (debugging, tests).

        Raises:
            AssertionError: naming what does not add up.
        """
        deferred: deque[tuple[int, list[Any]]] = self.deferred_frees
        jobs = self.compaction.jobs.running
        held: list[Sequence[KVCacheBlock]] = [
            blocks for study in self.studies.values() for blocks in study.windows
        ]
        held += [*self.compaction.names.held, *self.compaction.transfers.held]
        self.compaction.blocks.check([*(blocks for _, blocks in deferred), *held])
        self.compaction.query_pool.check()
        self.check_passes()
        if set(jobs) - {r.request_id for r in self.running}:
            raise AssertionError("a compaction runs for a request that does not")
        if len(self.compaction.blocks.targets) != len(self.compaction.jobs.all):
            raise AssertionError("targets and jobs differ")


class CompactionScheduler(CompactionSchedulerMixin, Scheduler):
    """vLLM's scheduler with compaction."""


class CompactionAsyncScheduler(CompactionSchedulerMixin, AsyncScheduler):
    """vLLM's async scheduler with compaction."""
