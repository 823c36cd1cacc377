"""Who waits for room in the query pool before it is read, where the pool of KV blocks is short.

A sequence that finds the query pool full when it is read stays exact: a fit to a part of its sample
loses most of what is asked later. Where the pool of KV blocks holds all that run and wait to their
ends, this costs nothing. Where it does not, the next prompt had better be read a moment later, when
a fit under way has given its queries back: as an exact sequence it would keep others out, or be
preempted, and be computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from vllm.v1.request import Request

from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.jobs import Jobs
from vllm_am.engine.scheduler.planner import Planner
from vllm_am.engine.scheduler.query_pool import Use
from vllm_am.engine.scheduler.reference_queries import ReferenceQueries
from vllm_am.engine.scheduler.sequences import Sequences
from vllm_am.engine.scheduler.sharing import Sharing

#: Steps between the end of a prompt and the beginning of its fit, with async scheduling.
_STEPS_BETWEEN = 3


class Admission:
    """Whether the next request is read now."""

    def __init__(
        self,
        planner: Planner,
        blocks: CompactingManager,
        sequences: Sequences,
        sharing: Sharing,
        queries: ReferenceQueries,
        jobs: Jobs,
    ) -> None:
        self._planner = planner
        self._blocks = blocks
        self._sequences = sequences
        self._sharing = sharing
        self._queries = queries
        self._jobs = jobs
        self._patience = 0
        """Steps until nothing is expected to give queries back any more."""
        self.waits = False
        """Somebody waits for room, in this step."""

    @contextmanager
    def limited(self, scheduler: Any) -> Iterator[None]:
        """While a step is scheduled, no more requests begin than :meth:`most` says.

        Args:
            scheduler: ours; while passes read texts, which want the same places, it is let alone.
        """
        before, self.waits = scheduler.max_num_active_reqs, False
        if not scheduler.studies:
            active = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
            admitted = self.most(scheduler.waiting, scheduler.running, before - active)
            if admitted is not None:
                scheduler.max_num_active_reqs = active + admitted
        try:
            yield
        finally:
            scheduler.max_num_active_reqs = before

    def most(
        self, waiting: Collection[Request], running: Iterable[Request], places: int
    ) -> int | None:
        """How many of those that wait may begin in this step; None: as many as find blocks.

        Those that find room for their queries. Where nobody does, and nothing is on the way that
        would make room, all may begin: nobody waits for ever.

        Args:
            waiting: in their order.
            places: most that can begin, whatever they need.
        """
        coming = self._jobs.all or self._queries.are_read
        self._patience = _STEPS_BETWEEN if coming else max(0, self._patience - 1)
        self.waits = False
        # Where nobody can begin, nobody need be looked at: the queue may be long.
        if not waiting or places <= 0 or not self._is_short(waiting, running):
            return None
        taken = 0.0
        rooms: dict[Use, float] = {}
        for count, request in enumerate(islice(waiting, places)):
            use = self._sequences.use_of_queries(request)
            if use in (Use.PERHAPS, Use.MUST):  # which waits for no room
                continue
            if use not in rooms:
                rooms[use] = self._queries.room(use)
            rate = self._sequences.options(request).sample_rate
            # Of what an entry stands for, nothing is read.
            taken += self._queries.needed(request, rate, self._sharing.tokens_found(request))
            if taken > rooms[use]:
                self.waits = count > 0 or self._patience > 0
                return count if self.waits else None
            self._patience = _STEPS_BETWEEN  # it begins, and its fit follows
        return None

    def _is_short(self, waiting: Iterable[Request], running: Iterable[Request]) -> bool:
        """Whether the pool of KV blocks could not hold all of these to their ends, beside the
        compacted prefixes, which would have to be read and compacted again."""
        free = self._blocks.block_pool.get_num_free_blocks() - self._blocks.cache.filed
        for request in running:
            free -= self._blocks_to_grow(request, request.num_computed_tokens)
        for request in waiting:
            if free < 0:
                return True
            free -= self._blocks_to_grow(request, self._sharing.tokens_found(request))
        return free < 0

    def _blocks_to_grow(self, request: Request, begun: int) -> int:
        """Blocks that it may come to need, beside what it has or stands on."""
        return self._planner.blocks_to_grow(max(0, self._sequences.longest(request) - begun))
