"""A fit has succeeded on every rank: its segment takes the place of what it was fitted to."""

from __future__ import annotations

from vllm_am.engine.messages import Activation, CompactionStep, FitReport, Publication
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.jobs import Job
from vllm_am.engine.scheduler.journal import Journal
from vllm_am.engine.scheduler.reference_queries import ReferenceQueries


class Commits:
    """Swaps blocks, and tells the workers from when on a sequence attends to its new segment."""

    def __init__(
        self, blocks: CompactingManager, queries: ReferenceQueries, journal: Journal
    ) -> None:
        self._blocks = blocks
        self._queries = queries
        self._journal = journal

    def commit(self, job: Job, report: FitReport, step: CompactionStep) -> None:
        """The freed blocks are back in the pool in time for this step's allocations."""
        if job.job_id in self._blocks.detached:
            self._publish(job, report, step)
            return
        if job.merges:
            self._merge(job, report)
        elif self._compact(job, report):
            # Told first, and whoever it was fitted for: its blocks are found from now on.
            step.published.append(Publication(job.job_id, job.segment))
            return
        step.activations.append(
            Activation(job.request.request_id, job.job_id, job.segment, replaces=job.merges)
        )

    def _publish(self, job: Job, report: FitReport, step: CompactionStep) -> None:
        """Its sequence has ended: the segment is for others."""
        pool = self._blocks.block_pool
        free, source = pool.get_num_free_blocks(), len(job.source_block_ids)
        if self._blocks.commit_detached(job.job_id, job.segment, job.request.block_hashes):
            step.published.append(Publication(job.job_id, job.segment))
        else:
            step.cancelled.append(job.job_id)
        freed = source - len(job.segment.block_ids)
        self._journal.compacted(job, report, freed, pool.get_num_free_blocks() - free)

    def _compact(self, job: Job, report: FitReport) -> bool:
        """Whether the segment was published."""
        request_id = job.request.request_id
        pool = self._blocks.block_pool
        held, free = self._blocks.held_blocks(request_id), pool.get_num_free_blocks()
        self._queries.keep(request_id, job.source_block_ids)
        hashes = None if job.key is None else job.request.block_hashes
        published = self._blocks.commit(job.job_id, request_id, job.segment, hashes)
        freed = held - self._blocks.held_blocks(request_id)
        self._journal.compacted(job, report, freed, pool.get_num_free_blocks() - free)
        return published

    def _merge(self, job: Job, report: FitReport) -> None:
        request_id = job.request.request_id
        segments = self._blocks.segments(request_id)
        self._blocks.commit_merge(job.job_id, request_id, job.segment)
        self._journal.merged(job, report, len(segments), sum(s.slots for s in segments))
