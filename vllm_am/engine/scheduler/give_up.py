"""A fit has failed, or would: the sequence stays as it is; when it is tried again, if ever."""

from __future__ import annotations

from vllm.v1.request import Request

from vllm_am.engine.messages import TOO_LOSSY, FitReport
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.jobs import Job
from vllm_am.engine.scheduler.journal import Journal
from vllm_am.engine.scheduler.planner import Planner, SequenceView, Span
from vllm_am.engine.scheduler.reference_queries import ReferenceQueries
from vllm_am.engine.scheduler.sequences import SequenceOptions, Sequences


class Failures:
    """What becomes of sequences whose fits fail.

    Args:
        max_error: of the configuration.
    """

    def __init__(
        self,
        blocks: CompactingManager,
        planner: Planner,
        sequences: Sequences,
        journal: Journal,
        max_error: float | None,
        queries: ReferenceQueries,
    ) -> None:
        self._blocks = blocks
        self._planner = planner
        self._sequences = sequences
        self._journal = journal
        self._max_error = max_error
        self._queries = queries

    def lacks_queries(self, request: Request, span: Span, view: SequenceView) -> bool:
        """Whether a sequence stays exact, as the query pool was full when its span was read.

        Not where that is impossible: it is fitted to what there is.
        """
        options = self._sequences.options(request)
        if view.computed < options.thin_until:
            return True
        if self._queries.suffice(span, options.sample_rate):
            return False
        if self._sequences.must_be_compacted(request):
            return False
        options.thin_until = view.computed + self._planner.min_span_tokens
        self._journal.too_few_queries(request.request_id)
        return True

    def give_up(self, job: Job, report: FitReport) -> None:
        """The target goes back; the fit is tried again once the sequence has grown."""
        assert report.failure is not None
        if job.job_id in self._blocks.detached:  # nobody is left to try again
            self._blocks.release_detached(job.job_id)
            self._journal.failed(job, report.failure)
            return
        self._blocks.release_target(job.job_id)
        options = self._sequences.options(job.request)
        if job.merges:
            options.unmerged_end = job.segment.end
        elif report.failure == TOO_LOSSY:
            self._keep_more(job, report, options)
            return
        else:
            options.not_before = job.request.num_computed_tokens + max(
                self._planner.min_span_tokens, job.segment.end - job.segment.start
            )
        self._journal.failed(job, report.failure)

    def _keep_more(self, job: Job, report: FitReport, options: SequenceOptions) -> None:
        """The error bound was exceeded: twice the slots from now on, or no compaction at all."""
        assert self._max_error is not None
        options.ratio *= 2
        options.enabled = options.ratio < 1
        self._journal.too_lossy(job, report, self._max_error, again=options.enabled)

    def outgrows_the_pool(self, request: Request) -> bool:
        """It is preempted although it runs alone: whether it is to be finished with an error.

        The pool may be smaller than ``max_model_len``, so a sequence whose fits have failed cannot
        go on. It is computed anew once, as a fit may fail for a passing lack of memory; the second
        time it is finished, or it might be computed for ever.
        """
        options = self._sequences.known.get(request.request_id)
        if options is None or not options.not_before:
            return False
        options.outgrew += 1
        if options.outgrew == 1:
            return False
        pool_tokens = self._planner.blocks_for_one * self._planner.block_size
        self._journal.unservable(request.request_id, request.num_tokens, pool_tokens)
        return True
