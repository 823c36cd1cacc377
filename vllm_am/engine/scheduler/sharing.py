"""Who begins life on a compacted prefix, who adopts one in place of a fit, who waits for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from vllm_am.engine.messages import Segment
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.compact_cache import Entry
from vllm_am.engine.scheduler.journal import Journal
from vllm_am.engine.scheduler.planner import Planner, Span
from vllm_am.engine.scheduler.sequences import SequenceOptions, Sequences


class Sharing:
    """The use of the cache of compacted prefixes.

    Only where a request would be compacted anyway, so that it never gets less than it would on its
    own; or where somebody has given a prefix a name, which is to say that it is to be used.
    """

    def __init__(
        self,
        planner: Planner,
        blocks: CompactingManager,
        sequences: Sequences,
        journal: Journal,
    ) -> None:
        self._planner = planner
        self._blocks = blocks
        self._sequences = sequences
        self._journal = journal
        most = blocks.max_admission_blocks_per_request or 0
        self._spare_blocks = max(0, planner.blocks_for_one - most)

    # -- new requests ---------------------------------------------------------------------------

    def hit(self, request: Request, exact: Sequence[KVCacheBlock]) -> list[KVCacheBlock] | None:
        """The blocks that a request begins with, where it is to begin on entries.

        Args:
            exact: cached blocks of its text, from the first on, without gaps.

        Returns:
            one for each block of tokens, null blocks for those that the entries stand for; None
            where it had better begin on the exact ones.
        """
        self._blocks.begin_on(request.request_id, ())
        size = self._blocks.block_size
        options = self._sequences.options(request)
        if not options.cache:
            return None
        limit = options.threshold_tokens
        chain = self._chain(request, options)
        # One that stays below the threshold would never be compacted.
        short = limit is not None and request.num_tokens <= limit
        while chain and (
            not self._may_stand_on(chain, options.ratio) or (short and not chain[-1].named)
        ):
            chain = chain[:-1]
        if not chain:
            return None
        first = chain[0].segment.start // size
        if len(exact) < first:
            return None
        end = chain[-1].segment.end
        # By the share of the pool that is in use, nothing need be compacted that is there.
        if limit is None and len(exact) * size >= end:
            return None
        most = request.num_tokens - 1
        behind = list(self._blocks.cache.blocks_behind(chain, request.block_hashes, most))
        held = first + sum(len(entry.blocks) for entry in chain)
        live_tokens = request.num_tokens - end + held * size
        room = self._planner.longest_hit(live_tokens, options.ratio) // size - held
        self._blocks.begin_on(request.request_id, chain)
        null = self._blocks.block_pool.null_block
        return [*exact[:first], *[null] * (end // size - first), *behind[: max(0, room)]]

    def tokens_found(self, request: Request) -> int:
        """Where the entries end that a request which waits is likely to begin on; 0: it finds none.

        As far as can be said without a look at the exact blocks that go before them.
        """
        options = self._sequences.options(request)
        if not options.cache:
            return 0
        chain = self._chain(request, options)
        return chain[-1].segment.end if chain else 0

    def _chain(self, request: Request, options: SequenceOptions) -> tuple[Entry, ...]:
        """The living entries that its text begins with."""
        most = request.num_tokens - 1  # the last one is computed, for its logits
        slots_of = self._slots_of(options.ratio)
        return self._blocks.cache.chain(request.block_hashes, most, slots_of)

    def count(self, new: Iterable[Request]) -> None:
        """Count the requests that were admitted in this step, and what they have found."""
        for request in new:
            if self._sequences.options(request).cache:
                segments = self._blocks.segments(request.request_id)
                tokens = segments[-1].end - segments[0].start if segments else 0
                self._journal.looked_up(request.request_id, tokens)

    # -- running sequences ----------------------------------------------------------------------

    def hashes(self, request: Request) -> Sequence[BlockHash] | None:
        """Those of its text, where its next segment may be published."""
        state = self._blocks.compacted.get(request.request_id)
        shared = state is None or state.shared
        takes_part = self._sequences.options(request).cache
        return request.block_hashes if shared and takes_part else None

    def key(self, request: Request, span: Span | Segment) -> BlockHash | None:
        """What a span would be published under; None where it would not be."""
        hashes = self.hashes(request)
        if hashes is None:
            return None
        parent = self._parent(request)
        return self._blocks.cache.key(parent, hashes, span.start, span.end, span.slots)

    def adopt(self, request: Request, computed: int) -> bool:
        """Let a sequence take a living entry in place of the fit that it is due for.

        Args:
            computed: tokens of it whose KV is certain.
        """
        hashes = self.hashes(request)
        if hashes is None:
            return False
        ratio = self._sequences.options(request).ratio
        parent = self._parent(request)
        entry = self._blocks.cache.find(parent, hashes, computed, self._slots_of(ratio))
        if entry is None or not self._may_stand_on((*self._entries(request), entry), ratio):
            return False
        held = self._blocks.held_blocks(request.request_id)
        self._blocks.adopt(request.request_id, entry)
        self._journal.adopted(
            request.request_id, entry.segment, held - self._blocks.held_blocks(request.request_id)
        )
        return True

    def coming(
        self,
        request: Request,
        span: Span,
        computed: int,
        others: Iterable[tuple[BlockHash | None, Span | Segment]],
    ) -> bool:
        """Whether an entry that it could adopt is being made for another sequence.

        Args:
            span: that it is due for.
            computed: tokens of it whose KV is certain.
            others: spans that are being compacted, with what they will be published under.
        """
        slots_of = self._slots_of(self._sequences.options(request).ratio)
        return any(
            key is not None
            and other.start == span.start < other.end <= computed
            and other.slots == slots_of(other.end - other.start)
            and key == self.key(request, other)
            for key, other in others
        )

    def _entries(self, request: Request) -> Sequence[Entry]:
        """Those that it stands on."""
        state = self._blocks.compacted.get(request.request_id)
        return () if state is None else state.entries

    def _parent(self, request: Request) -> Entry | None:
        """The entry that its next segment would stand on."""
        entries = self._entries(request)
        return entries[-1] if entries else None

    def _may_stand_on(self, chain: Sequence[Entry], ratio: float) -> bool:
        """Whether a chain takes no more blocks than any sequence of its length is counted with.

        Others may have cut the same text into shorter spans, each of which fills up a block; and
        what was saved by other ranks may divide worse among these. Such a sequence can do with what
        the pool has beyond the largest one.
        """
        worse = 0
        for entry in chain:
            tokens = entry.segment.end - entry.segment.start
            worse += max(0, len(entry.blocks) - self._planner.span_blocks(tokens, ratio))
        if len(chain) < 2 and not worse:
            return True
        tokens = chain[-1].segment.end - chain[0].segment.start
        blocks = sum(len(entry.blocks) for entry in chain)
        counted = self._planner.compacted_blocks(tokens, ratio)
        return blocks <= counted + min(worse, self._spare_blocks)

    def _slots_of(self, ratio: float) -> Callable[[int], int]:
        return lambda tokens: self._planner.span_slots(tokens, ratio)
