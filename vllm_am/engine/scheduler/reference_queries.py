"""The reference queries of a compaction: which are kept in each step, which a fit reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_am.config import PASS_SOURCES
from vllm_am.engine.limits import PROMPT_TAIL_POSITIONS, EngineLimits
from vllm_am.engine.messages import QuerySample, RandomQueries
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.planner import Span
from vllm_am.engine.scheduler.query_pool import Owner, QueryPool, Use
from vllm_am.engine.scheduler.query_sources import select, shifts_behind, thin

#: Share of its regular sample that a span is fitted to at least. Of the bundled model's facts at
#: 20x the whole sample keeps 98 to 100 %, three quarters of it 95 to 96, a half 92 to 94, a quarter
#: 67 to 78 (benchmarks/results/quality-queries.md), and the held-out error does not tell.
SUFFICIENT_SHARE = 0.9

#: The same of cached blocks that a sequence begins on which the pool could not hold as it is.
LEAST_SHARE = 1 / 8

#: Sampled positions that random queries take their size from.
RANDOM_LIKE_POSITIONS = 256


@dataclass(frozen=True)
class JobQueries:
    """The reference queries of one compaction.

    The same ones in every slice: what is measured in one step is fitted in a later one.
    """

    slots: np.ndarray
    """int64 [n]: slots of the query pool."""
    shifts: np.ndarray
    """int64 [n]: see ``FitSlice.query_shifts``."""
    drawn: RandomQueries | None

    @property
    def slots_read(self) -> np.ndarray:
        """int64: every slot of the query pool that a slice reads."""
        like = [] if self.drawn is None else [self.drawn.like]
        return np.concatenate([self.slots, *like])

    @property
    def positions(self) -> int:
        """Query vectors per query head."""
        return len(self.slots) + (self.drawn.positions if self.drawn else 0)


@dataclass(frozen=True)
class Sampling:
    """Which queries of one request are kept in a step."""

    start: int
    """Position of the first token computed in the step."""
    count: int
    """Tokens computed in it."""
    rate: float
    """Share of the positions to keep."""
    always_from: int
    """Positions from here on are all kept."""
    owner_of: Callable[[int], Owner]
    """From block index to owner in the query pool."""
    use: Use = Use.MUST

    @property
    def wanted(self) -> float:
        """Positions that are asked for."""
        tail = min(self.count, max(0, self.start + self.count - self.always_from))
        return self.rate * (self.count - tail) + tail


@dataclass
class Reading:
    """A request whose prompt is read, or was."""

    use: Use
    """Of its samples."""
    left: float
    """Positions that it is still going to ask for."""


def keeper(request_id: str) -> Owner:
    """Who owns the kept queries of a sequence's compacted tokens in the query pool."""
    return (request_id, 0)


class ReferenceQueries:
    """Chooses reference queries, in the proportions of the configured mixture."""

    def __init__(self, limits: EngineLimits, blocks: CompactingManager, pool: QueryPool) -> None:
        self._limits = limits
        self._config = limits.config
        self._blocks = blocks
        self._pool = pool
        self._reading: dict[str, Reading] = {}
        """By request."""

    # -- of a compaction ------------------------------------------------------------------------

    def choose(
        self,
        span: Span,
        of_passes: Mapping[str, Iterable[Owner]],
        cut_short: bool,
        shared_rate: float | None = None,
    ) -> JobQueries:
        """Sampled positions of all sources.

        Args:
            of_passes: by source, the owners of what reference passes have left in the pool.
            cut_short: not all of the passes ran to their end.
            shared_rate: of a segment that others will attend to, the rate at which the positions
                of its sequence are sampled: nothing but a regular sample of the span itself is
                read then, so that it carries no trace of what was asked behind it.
        """
        context = self._context(span, shared_rate)
        slots = self._slots(context, of_passes, cut_short)
        return JobQueries(slots, self._shifts(slots, span), self._random(context))

    def _slots(
        self, context: np.ndarray, of_passes: Mapping[str, Iterable[Owner]], cut_short: bool
    ) -> np.ndarray:
        found = {source: self._pool.slots(owners) for source, owners in of_passes.items()}
        found["context"] = context
        due = set(self._config.query_fractions) & set(PASS_SOURCES)
        return select(
            found,
            self._config.query_fractions,
            self._limits.sample_positions,
            keep_last=PROMPT_TAIL_POSITIONS,
            cut_short=cut_short or not due <= set(of_passes),
        )

    def _shifts(self, slots: np.ndarray, span: Span) -> np.ndarray:
        """int64 [n]: by how much each of the sampled queries is moved."""
        if not self._config.rotates_context:
            return np.zeros_like(slots)
        return shifts_behind(self._pool.positions[slots], span.end)

    def suffice(self, span: Span, rate: float) -> bool:
        """Whether a span can be fitted well to the regular sample of itself alone; see
        :meth:`choose`."""
        if self._config.pass_fraction == 1:
            return True
        regular = self._pool.regular(span.start, span.end, rate)
        return len(self._context(span, rate)) >= max(1.0, SUFFICIENT_SHARE * regular)

    def blocks_with_queries(
        self, blocks: Sequence[KVCacheBlock], rate: float, tokens: int, use: Use
    ) -> int:
        """How many leading blocks of a cached prefix a sequence had better begin on.

        The queries of blocks that nobody uses are the first to go in a full pool. A fit without any
        would lose nearly everything: better to compute the tokens once more, if that brings them
        back.

        Args:
            rate: at which positions of the sequence are sampled.
            tokens: of its prompt.
            use: of its samples.
        """
        if self._config.pass_fraction == 1 or use is Use.PERHAPS:
            return len(blocks)
        least = SUFFICIENT_SHARE
        if self.room(use) < rate * tokens:
            if use is not Use.MUST:
                return len(blocks)
            least = LEAST_SHARE
        found = np.cumsum([self._pool.count(block.block_id) for block in blocks])
        size = self._limits.block_size
        ends = range(size, size * len(blocks) + 1, size)
        regular = np.cumsum([self._pool.regular(end - size, end, rate) for end in ends])
        enough = np.flatnonzero(found >= least * regular)
        return int(enough[-1]) + 1 if len(enough) else 0

    def _context(self, span: Span, shared_rate: float | None = None) -> np.ndarray:
        """All queries sampled so far at or after the start of the span.

        Args:
            shared_rate: only those within the span, of a regular sample; see :meth:`choose`.
        """
        blocks = self._blocks.req_to_blocks[span.request_id]
        first = span.start // self._limits.block_size
        owners = [keeper(span.request_id), *(b.block_id for b in blocks[first:])]
        slots = self._pool.slots(owners)
        slots = slots[self._pool.positions[slots] >= span.start]
        if shared_rate is None:
            return slots
        within = self._pool.positions[slots] < span.end
        return slots[within & self._pool.is_regular(slots, shared_rate)]

    def _random(self, context: np.ndarray) -> RandomQueries | None:
        """The random part of the mixture, like the queries of the sequence itself."""
        fraction = self._config.query_fractions.get("random")
        if fraction is None:
            return None
        positions = max(1, round(fraction * self._limits.sample_positions))
        return RandomQueries(positions, thin(context, RANDOM_LIKE_POSITIONS))

    # -- of a step ------------------------------------------------------------------------------

    def forget_handed_out(self, output: SchedulerOutput) -> None:
        """Blocks that changed hands in this step lose the queries of their former tokens."""
        size, group = self._limits.block_size, self._blocks.kv_cache_group_id
        for new in output.scheduled_new_reqs:
            self._forget(new.block_ids, group, new.num_computed_tokens // size)
        cached = output.scheduled_cached_reqs
        for request_id, ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if ids is not None:
                fresh = computed // size if request_id in cached.resumed_req_ids else 0
                self._forget(ids, group, fresh)

    def _forget(self, block_ids: Sequence[Sequence[int]], group: int, fresh: int) -> None:
        """Blocks that a request has got, by KV cache group; in ours, those from ``fresh`` on are
        new to it. No block of another group has any queries from now on."""
        for number, ids in enumerate(block_ids):
            self._pool.forget(ids[fresh:] if number == group else ids)

    def sampling(
        self, request: Request, count: int, rate: float, use_of: Callable[[Request], Use]
    ) -> Sampling:
        """What is kept of the ``count`` tokens that a user's request computes in this step.

        Also of requests that will not be compacted: their blocks may be another's prefix.

        Args:
            use_of: asked once, when the first of its tokens are computed.
        """
        blocks = self._blocks.req_to_blocks[request.request_id]
        reading = self._reading.get(request.request_id)
        if reading is None:
            reading = self._reading[request.request_id] = self._begin(
                request, count, rate, use_of(request)
            )
        reads_prompt = request.num_computed_tokens <= request.num_prompt_tokens
        tail = max(0, request.num_prompt_tokens - PROMPT_TAIL_POSITIONS)
        return Sampling(
            request.num_computed_tokens - count,
            count,
            rate,
            always_from=tail if reads_prompt else sys.maxsize,
            owner_of=lambda index: blocks[index].block_id,
            use=reading.use,
        )

    def _begin(self, request: Request, count: int, rate: float, use: Use) -> Reading:
        """What the samples of a request are of use for, which computes its first tokens now.

        Those that it begins with are of use to it, too. Where there is no room for all that it
        would have to have, others had better have what there is.
        """
        if use is Use.PERHAPS:
            return Reading(use, 0.0)
        blocks = self._blocks.req_to_blocks[request.request_id]
        begun = request.num_computed_tokens - count
        held = [b.block_id for b in blocks[: begun // self._limits.block_size] if not b.is_null]
        self._pool.promote(held, use)
        needed = self.needed(request, rate, begun)
        if use is not Use.MUST and needed > self.room(use):
            return Reading(Use.PERHAPS, 0.0)
        return Reading(use, needed)

    def needed(self, request: Request, rate: float, begun: int = 0) -> float:
        """Positions of its prompt from token ``begun`` on that are kept."""
        tokens = request.num_prompt_tokens - begun
        return rate * tokens + (1 - rate) * min(tokens, PROMPT_TAIL_POSITIONS)

    @property
    def are_read(self) -> bool:
        """Whether a prompt is being read whose sample is kept."""
        return any(reading.left > 0 for reading in self._reading.values())

    def room(self, use: Use) -> float:
        """Positions that a sequence may have now, beside what others are going to read."""
        promised = sum(reading.left for reading in self._reading.values() if reading.use >= use)
        return self._pool.room(use) - promised

    def sample(self, wanted: Mapping[str, Sampling]) -> dict[str, QuerySample]:
        """Choose which queries of this step are kept, by request."""
        must = (s.wanted for s in wanted.values() if s.use is Use.MUST)
        self._pool.begin_step(sum(must))
        samples = {}
        # What is of more use first: nothing that was chosen in this step may be given up in it.
        for request_id, s in sorted(wanted.items(), key=lambda item: -item[1].use):
            offsets, slots = self._pool.sample(
                s.owner_of, s.start, s.count, s.rate, s.always_from, s.use
            )
            if len(slots):
                samples[request_id] = QuerySample(offsets, slots)
            if reading := self._reading.get(request_id):
                reading.left -= min(reading.left, s.rate * s.count)
        return samples

    # -- of compacted tokens --------------------------------------------------------------------

    def keep(self, request_id: str, block_ids: Iterable[int]) -> None:
        """For merges to come, where there are any: these blocks are about to go."""
        if self._config.merge_slots is not None:
            self._pool.keep(block_ids, keeper(request_id), self._limits.sample_positions)

    def forget(self, request_id: str) -> None:
        """The sequence goes, and with it the kept queries of its compacted tokens."""
        self._reading.pop(request_id, None)
        self._pool.forget([keeper(request_id)])
