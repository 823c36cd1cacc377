"""When a sequence is compacted, and which span: pure policy, no vLLM.

As late as memory allows: a prompt that fits in the pool is compacted once its prefill is complete,
so that its last tokens (the question) are among the reference queries; a prompt that does not fit
is compacted as it goes. Every token is compacted once; only when a sequence's segments outgrow
``merge_slots`` are they merged into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_am.engine.footprint import Footprint, ceil_div

if TYPE_CHECKING:
    from vllm_am.engine.limits import EngineLimits


@dataclass(frozen=True)
class SequenceView:
    """What the planner knows of a running sequence (all counts in tokens)."""

    request_id: str
    computed: int
    """Tokens whose KV is certain: never rolled back by rejected drafts or pending samples."""
    prompt: int
    compacted_end: int
    """End of the last compacted segment, or the protected prefix where there is none."""
    exact_tokens: int
    """Tokens held uncompacted (protected prefix and everything after the last segment)."""
    ratio: float
    threshold_tokens: int | None
    """The request's own threshold, or the engine's; None when that is a share of the pool."""
    compacted_blocks: int = 0
    """That its segments occupy."""
    marked_end: int = 0
    """Where the prefix ends that the request says others have, in whole blocks; 0: nothing said."""
    common_end: Callable[[], int] = int
    """Where the prefix ends that other prompts had, in whole blocks; 0: none had any. Asked only
    when a span is due."""
    steps_left: int | None = None
    """Steps in which it can still be told of a fit that begins now; None: nobody knows."""
    forced: bool = False
    """It is compacted even if it ends too soon to gain by it."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of a sequence, to be held in ``slots`` slots per head on average."""

    request_id: str
    start: int
    end: int
    slots: int
    wanted: bool = False
    """Others have, or will have, the same text up to there: its segment is worth having for them,
    even if the sequence ends before it is there."""


@dataclass(frozen=True, kw_only=True)
class Planner(Footprint):
    """The policy, on top of what a sequence needs: everything that serving does not change."""

    num_blocks: int
    """Usable blocks of the pool."""
    merge_slots: int | None = None
    """Slots per head above which the segments of a sequence are merged; None: never."""
    other_groups: int = 0
    """Groups of layers beside those that are compacted, each with blocks of its own."""
    other_blocks: int = 0
    """Most blocks that one sequence holds for them, whatever its length."""
    fit_steps: Callable[[int, int], int] = lambda tokens, slots: 1
    """Steps that a fit of so many tokens into so many slots takes."""

    @classmethod
    def of(
        cls,
        limits: EngineLimits,
        num_blocks: int,
        other_groups: int = 0,
        other_blocks: int = 0,
        fit_steps: Callable[[int, int], int] = lambda tokens, slots: 1,
    ) -> Planner:
        """The policy of an engine with a pool of ``num_blocks`` usable blocks."""
        return cls(
            **vars(limits.footprint),
            num_blocks=num_blocks,
            merge_slots=limits.config.merge_slots,
            other_groups=other_groups,
            other_blocks=other_blocks,
            fit_steps=fit_steps,
        )

    @property
    def blocks_for_one(self) -> int:
        """Most blocks that the layers of one sequence that are compacted can have."""
        return self.num_blocks - self.other_blocks

    def blocks_to_grow(self, tokens: int) -> int:
        """Blocks that a sequence needs for more tokens, in all layers."""
        blocks = ceil_div(tokens, self.block_size)
        return blocks + min(self.other_groups * blocks, self.other_blocks)

    def merged_blocks(self, slots: int, blocks: int) -> int | None:
        """Blocks to merge all segments of a sequence into; None where that is not due.

        The limit itself: old text is compacted again more often than if a merge left room for
        further segments, but each merge loses much less, and so do all of them together
        (``benchmarks/quality/rounds.py`` measures it).

        Args:
            slots: that the segments have per head, on average.
            blocks: that they occupy.
        """
        if self.merge_slots is None or slots <= self.merge_slots:
            return None
        target = max(1, self.merge_slots // self.block_size)
        return target if target < blocks else None

    def longest_hit(self, tokens: int, ratio: float) -> int:
        """Most tokens, in whole blocks, that a sequence may take from the prefix cache.

        Cached blocks are all taken at once. Those of a sequence that does not fit in the pool must
        leave room for its next chunk and for the target of their compaction: it would wait for
        ever for blocks that nothing but its own compaction could free.

        Args:
            tokens: all that are known of the sequence.
            ratio: at which it is compacted.
        """
        beside = self.span_blocks(tokens, ratio) + 1
        if ceil_div(tokens, self.block_size) + beside <= self.blocks_for_one:
            return tokens
        chunk = ceil_div(min(tokens, self.in_flight_tokens), self.block_size)
        # h blocks and their target: h + ceil(ratio * h).
        most = int((self.blocks_for_one - chunk - 2) / (1 + ratio))
        return max(0, most) * self.block_size

    def spans(
        self,
        sequences: Iterable[SequenceView],
        free_blocks: int,
        coming_blocks: int = 0,
        room_wanted: bool = False,
    ) -> Iterator[Span]:
        """Spans to compact now, most urgent first; the caller takes as many as it can place.

        Args:
            sequences: the running sequences that no compaction is under way for.
            free_blocks: blocks that can be had now.
            coming_blocks: blocks that compactions under way will give back.
            room_wanted: a prompt waits for room for its reference queries, as the pool could not
                hold it to its end: whoever has some had better be compacted now, and give them back
                (admission.py). Later there would be as little room, and nobody's queries.
        """
        ready = [s for s in sequences if not self._can_wait(s, free_blocks)]
        if self.threshold.tokens is not None:
            due = [s for s in ready if self._over_threshold(s)]
        else:
            due = self._under_pressure(ready, free_blocks, coming_blocks, room_wanted)
        for sequence in due:
            span = self.next_span(sequence, free_blocks)
            if span is not None:
                free_blocks -= ceil_div(span.slots, self.block_size)
                yield span

    def _over_threshold(self, sequence: SequenceView) -> bool:
        limit = sequence.threshold_tokens
        return limit is not None and sequence.exact_tokens > limit

    def _under_pressure(
        self,
        sequences: list[SequenceView],
        free_blocks: int,
        coming_blocks: int,
        room_wanted: bool,
    ) -> list[SequenceView]:
        """Longest uncompacted sequences first, until the pool would be below its threshold.

        However high that is, the next step's tokens and a target to compact into must fit.
        """
        share = int((self.threshold.pool_share or 0) * self.num_blocks)
        excess = max(self.num_blocks - share, self._headroom(sequences))
        excess -= free_blocks + coming_blocks
        due = [s for s in sequences if self._over_threshold(s)]
        rest = [s for s in sequences if s.threshold_tokens is None]
        for sequence in sorted(rest, key=lambda s: -s.exact_tokens):
            if excess <= 0 and not room_wanted:
                break
            span = self.next_span(sequence, free_blocks)
            if span is None or span.end - span.start < self.shortest_span(sequence.ratio):
                continue
            due.append(sequence)
            raw = (span.end - span.start) // self.block_size
            excess -= raw - ceil_div(span.slots, self.block_size)
        return due

    def _headroom(self, sequences: list[SequenceView]) -> int:
        """Free blocks that the next step may need, and the smallest target beside them."""
        growth = sum(max(1, s.prompt - s.computed) for s in sequences)
        targets = (self.span_blocks(self.shortest_span(s.ratio), s.ratio) for s in sequences)
        blocks = min(growth, self.in_flight_tokens) // self.block_size + len(sequences)
        return blocks * (1 + self.other_groups) + max(targets, default=0)

    def _can_wait(self, sequence: SequenceView, free_blocks: int) -> bool:
        """Still in prefill, and the rest of the prompt and its compaction fit beside it."""
        missing = sequence.prompt - sequence.computed
        if missing <= 0:
            return False
        target = self.span_blocks(sequence.prompt - sequence.compacted_end, sequence.ratio)
        return self.blocks_to_grow(missing) + 1 + target <= free_blocks

    def next_span(self, sequence: SequenceView, free_blocks: int) -> Span | None:
        """The span after the last segment, as long as allowed and as the free blocks can hold."""
        size = self.block_size
        start = sequence.compacted_end
        end, wanted = self._end(sequence)
        end = min(end, start + self.longest_span)
        if sequence.ratio < 1 and end > start:
            # In a full pool a shorter span still makes progress: one free block takes
            # block_size / ratio tokens, and gives back 1 / ratio blocks.
            end = min(end, start + int(free_blocks * size / sequence.ratio) // size * size)
        if end <= start:
            return None
        blocks = self.span_blocks(end - start, sequence.ratio)
        if blocks > free_blocks or (sequence.ratio < 1 and blocks >= (end - start) // size):
            return None
        slots = self.span_slots(end - start, sequence.ratio)
        span = Span(sequence.request_id, start, end, slots, wanted)
        return span if self.pays(sequence, span) else None

    def pays(self, sequence: SequenceView, span: Span) -> bool:
        """Whether anybody gains by a compaction that begins now: the sequence, or those to come.

        A sequence gains if it lives on, with less memory, for at least as long as its compaction
        takes; how long that is, is known (pace.py), and shorter while somebody waits for blocks.
        One whose end is not known is taken to live. For those to come it is made where they are
        known to begin with the same text. And a request can insist (``"force"``).
        """
        tokens = span.end - span.start
        return span.wanted or self.gains(tokens, span.slots, sequence.steps_left, sequence.forced)

    def gains(self, tokens: int, slots: int, steps_left: int | None, forced: bool) -> bool:
        """Whether a sequence itself gains by a compaction; see :meth:`pays`."""
        if forced or steps_left is None:
            return True
        return steps_left >= 2 * self.fit_steps(tokens, slots)

    def _end(self, sequence: SequenceView) -> tuple[int, bool]:
        """Where the next span should end: with the text that others have, so that they share it;
        and whether it does.

        Where the request has marked it, there exactly. Otherwise the most recent tokens stay exact,
        and what follows on a common prefix waits for a span of its own, if it is the lesser part.
        """
        start = sequence.compacted_end
        end = (sequence.computed - self.recent_tokens) // self.block_size * self.block_size
        least = start + self.shortest_prefix(sequence.ratio)
        if shared := sequence.marked_end:
            there = least <= shared <= sequence.computed
        else:
            shared = sequence.common_end() if end >= least else 0
            there = max(least, (start + end) // 2) <= shared < end
        there = there and self._may_end(sequence, shared)
        return (shared if there else end), there or shared >= end > start

    def _may_end(self, sequence: SequenceView, end: int) -> bool:
        """Whether a span that ends there leaves the sequence within what it is counted with."""
        blocks = self.span_blocks(end - sequence.compacted_end, sequence.ratio)
        most = self.compacted_blocks(end - self.protected_tokens, sequence.ratio)
        return sequence.compacted_blocks + blocks <= most
