"""When a sequence is compacted, and which span: pure policy, no vLLM.

As late as memory allows: a prompt that fits in the pool is compacted once its prefill is complete,
so that its last tokens (the question) are among the reference queries; a prompt that does not fit
is compacted as it goes. Every token is compacted once; only when a sequence's segments outgrow
``merge_slots`` are they merged into one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vllm_am.config import Threshold


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of a sequence, to be held in ``slots`` slots per head on average."""

    request_id: str
    start: int
    end: int
    slots: int


@dataclass(frozen=True)
class Planner:
    """The policy, with everything it depends on that does not change while serving."""

    threshold: Threshold
    block_size: int
    num_blocks: int
    recent_tokens: int
    min_span_tokens: int
    max_span_tokens: int
    protected_tokens: int = 0
    """The protected prefix, in whole blocks."""
    in_flight_tokens: int = 0
    """Most tokens that steps under way can add."""
    merge_slots: int | None = None
    """Slots per head above which the segments of a sequence are merged; None: never."""

    @property
    def longest_span(self) -> int:
        """``max_span_tokens`` in whole blocks, one at least."""
        return max(self.block_size, self.max_span_tokens // self.block_size * self.block_size)

    def shortest_span(self, ratio: float) -> int:
        """Fewest tokens that are compacted at once; more than ``longest_span``: never any."""
        size = self.block_size
        if self.threshold.tokens is not None:
            tokens = self.threshold.tokens + 1 - self.protected_tokens - self.recent_tokens
            due = tokens // size * size
        else:
            due = ceil_div(self.min_span_tokens, size) * size
        # k blocks of tokens give a block back from k * (1 - ratio) >= 1 on.
        freeing = size if ratio >= 1 else math.ceil(1 / (1 - ratio) - 1e-9) * size
        return max(min(due, self.longest_span), freeing)

    def span_blocks(self, tokens: int, ratio: float) -> int:
        """Blocks that ``tokens`` compacted tokens occupy: ceil(ceil(ratio * tokens) / block)."""
        return ceil_div(slots_for(tokens, ratio), self.block_size)

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

    def peak_tokens(self, ratio: float, max_model_len: int) -> int:
        """Most tokens' worth of slots a sequence of ``max_model_len`` needs at any time.

        What the startup check on ``max_model_len`` and the admission of a request count with:
        the uncompacted tokens at the moment a compaction is due, the tokens computed until it
        takes effect (two steps' worth), the block-rounded segments so far, and the target of the
        segment being fitted. Never more than the sequence itself. Merges are not counted on: one
        that fails leaves the segments as they are.
        """
        shortest = self.shortest_span(ratio)
        if ratio >= 1 or shortest > self.longest_span:
            return max_model_len
        due = self.protected_tokens + self.recent_tokens + shortest
        # A step with the fit and a step until its report is seen go by before blocks come back.
        exact = max(due, self.threshold.tokens or 0)
        exact += 2 * self.in_flight_tokens + 2 * self.block_size
        # The most blocks per token that any length of span is rounded up to.
        lengths = range(shortest, self.longest_span + 1, self.block_size)
        blocks = max(self.span_blocks(n, ratio) / n for n in lengths) * max_model_len
        compacted = math.ceil(blocks) * self.block_size
        target = self.span_blocks(exact, ratio) * self.block_size
        return min(max_model_len, exact + compacted + target)

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
        if ceil_div(tokens, self.block_size) + beside <= self.num_blocks:
            return tokens
        chunk = ceil_div(min(tokens, self.in_flight_tokens), self.block_size)
        # h blocks and their target: h + ceil(ratio * h).
        most = int((self.num_blocks - chunk - 2) / (1 + ratio))
        return max(0, most) * self.block_size

    def spans(
        self, sequences: Iterable[SequenceView], free_blocks: int, coming_blocks: int = 0
    ) -> Iterator[Span]:
        """Spans to compact now, most urgent first; the caller takes as many as it can place.

        Args:
            sequences: the running sequences that no compaction is under way for.
            free_blocks: blocks that can be had now.
            coming_blocks: blocks that compactions under way will give back.
        """
        ready = [s for s in sequences if not self._can_wait(s, free_blocks)]
        if self.threshold.tokens is not None:
            due = [s for s in ready if self._over_threshold(s)]
        else:
            due = self._under_pressure(ready, free_blocks, coming_blocks)
        for sequence in due:
            span = self.next_span(sequence, free_blocks)
            if span is not None:
                free_blocks -= ceil_div(span.slots, self.block_size)
                yield span

    def _over_threshold(self, sequence: SequenceView) -> bool:
        limit = sequence.threshold_tokens
        return limit is not None and sequence.exact_tokens > limit

    def _under_pressure(
        self, sequences: list[SequenceView], free_blocks: int, coming_blocks: int
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
            if excess <= 0:
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
        return (
            min(growth, self.in_flight_tokens) // self.block_size
            + len(sequences)
            + max(targets, default=0)
        )

    def _can_wait(self, sequence: SequenceView, free_blocks: int) -> bool:
        """Still in prefill, and the rest of the prompt and its compaction fit beside it."""
        missing = sequence.prompt - sequence.computed
        if missing <= 0:
            return False
        target = self.span_blocks(sequence.prompt - sequence.compacted_end, sequence.ratio)
        return ceil_div(missing, self.block_size) + 1 + target <= free_blocks

    def next_span(self, sequence: SequenceView, free_blocks: int) -> Span | None:
        """The span after the last segment, as long as allowed and as the free blocks can hold."""
        size = self.block_size
        start = sequence.compacted_end
        end = (sequence.computed - self.recent_tokens) // size * size
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
        # Whole blocks: the slots up to the end of the last one cost nothing.
        return Span(sequence.request_id, start, end, min(end - start, blocks * size))


def slots_for(tokens: int, ratio: float) -> int:
    """Least slots per head that a span is compacted to: ceil(ratio * tokens)."""
    # The tiny slack keeps ceil from counting the rounding error of e.g. 0.1 * 1000.
    return min(tokens, max(1, math.ceil(ratio * tokens - 1e-9 * tokens)))
