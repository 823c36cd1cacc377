"""What one sequence needs of the KV pool when it is compacted as it goes: pure arithmetic, no vLLM.

The front end refuses with it what could not be served, vLLM's startup check and its admission of a
request count with it (through the cache spec), and the planner plans with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_am.config import Threshold


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def slots_for(tokens: int, ratio: float) -> int:
    """Least slots per head that a span is compacted to: ceil(ratio * tokens)."""
    # The tiny slack keeps ceil from counting the rounding error of e.g. 0.1 * 1000.
    return min(tokens, max(1, math.ceil(ratio * tokens - 1e-9 * tokens)))


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Tokens and blocks of a sequence, by the options that they depend on (counts in tokens)."""

    threshold: Threshold
    block_size: int
    recent_tokens: int
    min_span_tokens: int
    max_span_tokens: int
    protected_tokens: int = 0
    """The protected prefix, in whole blocks."""
    in_flight_tokens: int = 0
    """Most tokens that steps under way can add."""
    shares: bool = False
    """Whether spans also end where other sequences go on differently."""

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
        return max(min(due, self.longest_span), self.least_span(ratio))

    def least_span(self, ratio: float) -> int:
        """Fewest tokens whose compaction gives a block back."""
        # k blocks do from k * (1 - ratio) >= 1 on.
        blocks = 1 if ratio >= 1 else math.ceil(1 / (1 - ratio) - 1e-9)
        return blocks * self.block_size

    def shortest_prefix(self, ratio: float) -> int:
        """Fewest tokens of a span that ends where other sequences go on differently."""
        by_share = self.threshold.tokens is None
        return self.shortest_span(ratio) if by_share else self.least_span(ratio)

    def span_blocks(self, tokens: int, ratio: float) -> int:
        """Blocks that ``tokens`` compacted tokens occupy: ceil(ceil(ratio * tokens) / block)."""
        return ceil_div(slots_for(tokens, ratio), self.block_size)

    def compacted_blocks(self, tokens: int, ratio: float) -> int:
        """Most blocks that ``tokens`` compacted tokens occupy, in spans of any length they have.

        One of them may end before its time, with a text that other sequences have, too.
        """
        lengths = range(self.shortest_span(ratio), self.longest_span + 1, self.block_size)
        most_per_token = max(self.span_blocks(n, ratio) / n for n in lengths)
        return math.ceil(most_per_token * tokens) + self.shares

    def span_slots(self, tokens: int, ratio: float) -> int:
        """Slots per head that a span gets: up to the end of its last block they cost nothing."""
        return min(tokens, self.span_blocks(tokens, ratio) * self.block_size)

    def reached(self, ratio: float) -> tuple[float, float]:
        """The least and the most by which spans shrink at a ratio, in whole blocks.

        From the shortest span that is compacted to the longest; lower than ``1 / ratio`` where a
        span's slots do not fill their last block.
        """
        lengths = range(self.shortest_span(ratio), self.longest_span + 1, self.block_size)
        factors = [n / (self.span_blocks(n, ratio) * self.block_size) for n in lengths]
        return min(factors, default=1.0), max(factors, default=1.0)

    def compacts(self, ratio: float, tokens: int) -> bool:
        """Whether a sequence that grows to ``tokens`` is ever compacted."""
        end = (tokens - self.recent_tokens) // self.block_size * self.block_size
        span = min(end - self.protected_tokens, self.longest_span)
        if span <= 0 or tokens <= (self.threshold.tokens or 0):
            return False
        if self.threshold.tokens is None and span < self.shortest_span(ratio):
            return False
        return ratio >= 1 or self.span_blocks(span, ratio) < span // self.block_size

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
        compacted = self.compacted_blocks(max_model_len, ratio) * self.block_size
        target = self.span_blocks(exact, ratio) * self.block_size
        return min(max_model_len, exact + compacted + target)
