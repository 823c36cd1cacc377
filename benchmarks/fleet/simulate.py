"""vLLM's scheduler and ours, step by step, without an engine behind them.

When a sequence is compacted, and which span, says the plugin's own planner. What is left out:
shared prefixes, reference passes, merges.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.fleet.costs import Costs, Work
from benchmarks.fleet.traces import Request
from vllm_am.config.options import PRESSED
from vllm_am.engine.footprint import ceil_div
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.scheduler.planner import Planner, SequenceView, Span


@dataclass(frozen=True)
class EngineShape:
    """An engine's memory and bounds; the names are vLLM's.

    Attributes:
        compaction: limits of an engine with the plugin; None is stock vLLM.
    """

    blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    compaction: EngineLimits | None = None


@dataclass
class Outcome:
    """What came of a trace."""

    seconds: float = 0.0
    output_tokens: int = 0
    work: Work = field(default_factory=Work)
    preemptions: int = 0
    compactions: int = 0
    fit_seconds: float = 0.0
    most_running: int = 0
    first_tokens: list[float] = field(default_factory=list)
    """Seconds from each request's arrival to its first token."""

    @property
    def tokens_per_second(self) -> float:
        """Of answers."""
        return self.output_tokens / self.seconds

    @property
    def mean_running(self) -> float:
        """Answers under way in a step."""
        return self.work.sequences / self.work.steps


@dataclass
class _Sequence:
    request: Request
    prompt: int
    """Tokens to read: of its prompt, and what it had written when it was preempted."""
    compacted_end: int
    known: int
    """Tokens that there are: of the prompt, and those generated."""
    computed: int = 0
    exact: int = 0
    """Tokens held as they are."""
    blocks: int = 0
    slots: int = 0
    compacted_blocks: int = 0
    span: Span | None = None
    """That is being fitted."""
    fit_left: float = 0.0
    """Seconds."""

    @property
    def done(self) -> bool:
        return self.known >= self.request.prompt + self.request.output

    @property
    def held(self) -> int:
        """Blocks, without those that a fit under way writes to."""
        return self.blocks + self.compacted_blocks


class Simulation:
    """One engine.

    Args:
        engine: its memory and bounds.
        costs: of its steps.
    """

    def __init__(self, engine: EngineShape, costs: Costs) -> None:
        self.engine, self.costs = engine, costs
        self.free = engine.blocks
        self.running: list[_Sequence] = []
        self.waiting: deque[_Sequence] = deque()
        self.outcome = Outcome()
        self._step_seconds = costs.steps
        self._held = False
        """A running sequence waits for blocks."""
        limits = engine.compaction
        self._protected = limits.protected_tokens if limits else 0
        self._planner = (
            None if limits is None else Planner.of(limits, engine.blocks, fit_steps=self._fit_steps)
        )

    def run(self, requests: Sequence[Request]) -> Outcome:
        """All of them, to the last token."""
        coming = deque(sorted(requests, key=lambda request: request.arrival))
        now = 0.0
        while coming or self.waiting or self.running:
            if not self.waiting and not self.running:
                now = max(now, coming[0].arrival)
            while coming and coming[0].arrival <= now:
                request = coming.popleft()
                self.waiting.append(self._begin(request, request.prompt))
            chunks = self._schedule()
            if not chunks and not self._fitting:
                raise ValueError("a request is longer than the pool")
            now += self._step(chunks, now)
            self.outcome.most_running = max(self.outcome.most_running, len(self.running))
            self.running = [s for s in self.running if not self._finish(s)]
        self.outcome.seconds = now
        return self.outcome

    def _schedule(self) -> list[tuple[_Sequence, int]]:
        """Who computes how many tokens: running sequences first, then waiting ones."""
        budget = self.engine.max_num_batched_tokens
        chunks: list[tuple[_Sequence, int]] = []
        preempted = self._held = False
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # preempted for one before it
            count = min(sequence.known - sequence.computed, budget)
            while count and not self._grow(sequence, count):
                if self._fitting:  # their blocks are coming: it waits a step instead
                    self._held, count = True, 0
                    break
                self._preempt(self.running[-1])
                preempted = True
                if sequence not in self.running:
                    count = 0
            if count:
                chunks.append((sequence, count))
                budget -= count
        while self.waiting and budget and not preempted and not self._held:
            sequence = self.waiting[0]
            if len(self.running) >= self.engine.max_num_seqs:
                break
            # What those whose prompts are being read still need is theirs.
            reserved = sum(max(0, self._peak(s) - s.held) for s in self.running)
            if self._peak(sequence) > self.free - reserved:
                break
            count = min(sequence.known, budget)
            if not self._grow(sequence, count):
                break
            self.running.append(self.waiting.popleft())
            chunks.append((sequence, count))
            budget -= count
        return chunks

    @property
    def _fitting(self) -> bool:
        return any(sequence.span is not None for sequence in self.running)

    def _begin(self, request: Request, known: int) -> _Sequence:
        return _Sequence(request, known, self._protected, known)

    def _peak(self, sequence: _Sequence) -> int:
        """Blocks that a sequence is admitted with: all of its prompt's, or what is held while a
        prompt is compacted as it goes; 0 once its prompt was read."""
        if sequence.computed >= sequence.prompt:
            return 0
        limits, tokens = self.engine.compaction, sequence.prompt
        if limits is not None:
            tokens = min(tokens, limits.peak_tokens)
        return ceil_div(tokens, self.engine.block_size)

    def _grow(self, sequence: _Sequence, count: int) -> bool:
        """Take the blocks of so many more tokens."""
        size = self.engine.block_size
        more = ceil_div(sequence.exact + count, size) - ceil_div(sequence.exact, size)
        if more > self.free:
            return False
        self.free -= more
        sequence.blocks += more
        sequence.exact += count
        return True

    def _preempt(self, sequence: _Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(self._begin(sequence.request, sequence.known))
        self.outcome.preemptions += 1

    def _release(self, sequence: _Sequence) -> None:
        self.free += sequence.held
        if sequence.span is not None:
            self.free += self._target(sequence.span)

    def _target(self, span: Span) -> int:
        return ceil_div(span.slots, self.engine.block_size)

    def _step(self, chunks: list[tuple[_Sequence, int]], now: float) -> float:
        """Compute, and fit; seconds that it takes."""
        read, pairs, written, held, slots = 0, 0.0, 0, 0, 0
        answered = []
        for sequence, count in chunks:
            context = sequence.exact + sequence.slots
            if sequence.computed < sequence.prompt:
                read += count
                pairs += count * (context - count / 2)
            else:
                written += 1
                held += sequence.exact
                slots += sequence.slots
            sequence.computed += count
            if sequence.computed >= sequence.known:
                answered.append(sequence)
        work = Work(1, read, pairs, written, held, slots)
        seconds = self.costs.seconds(work)
        self._step_seconds = seconds
        if self._planner is not None:
            self._start_fits(self._planner)
            seconds += self._fit(seconds)
        for sequence in answered:
            if sequence.known == sequence.request.prompt:
                self.outcome.first_tokens.append(now + seconds - sequence.request.arrival)
            sequence.known += 1
            self.outcome.output_tokens += 1
        self.outcome.work += work
        return seconds

    def _start_fits(self, planner: Planner) -> None:
        threshold = planner.threshold.tokens
        views = [
            self._view(str(index), sequence)
            for index, sequence in enumerate(self.running)
            if sequence.span is None and (threshold is None or sequence.exact > threshold)
        ]
        for span in planner.spans(views, self.free):
            sequence = self.running[int(span.request_id)]
            if self._target(span) <= self.free:
                self.free -= self._target(span)
                sequence.span = span
                sequence.fit_left = (span.end - span.start) * self.costs.fit_tokens

    def _view(self, name: str, sequence: _Sequence) -> SequenceView:
        limits = self.engine.compaction
        assert limits is not None
        return SequenceView(
            name,
            computed=sequence.computed,
            prompt=sequence.prompt,
            compacted_end=sequence.compacted_end,
            exact_tokens=sequence.exact,
            ratio=limits.config.ratio,
            threshold_tokens=limits.threshold.tokens,
            compacted_blocks=sequence.compacted_blocks,
            steps_left=sequence.request.prompt + sequence.request.output - sequence.known,
        )

    def _allowed(self, step: float) -> float:
        """Seconds that fits may add to a step of so many."""
        limit = self.costs.step_limit
        return PRESSED * limit if self._held or self._waits() else min(step, limit)

    def _waits(self) -> bool:
        """Whether the next one waits for blocks."""
        if not self.waiting or len(self.running) >= self.engine.max_num_seqs:
            return False
        return ceil_div(self.waiting[0].known, self.engine.block_size) > self.free

    def _fit_steps(self, tokens: int, slots: int) -> int:
        """Of ``Planner``."""
        return math.ceil(tokens * self.costs.fit_tokens / self._allowed(self._step_seconds))

    def _fit(self, step: float) -> float:
        """Go on with fits; seconds that this adds to a step of so many."""
        allowed, spent = self._allowed(step), 0.0
        for sequence in self.running:
            if sequence.span is None or spent >= allowed:
                continue
            taken = min(sequence.fit_left, allowed - spent)
            sequence.fit_left -= taken
            spent += taken
            if sequence.fit_left <= 0:
                self._commit(sequence, sequence.span)
        self.outcome.fit_seconds += spent
        return spent

    def _commit(self, sequence: _Sequence, span: Span) -> None:
        sequence.exact -= span.end - span.start
        blocks = ceil_div(sequence.exact, self.engine.block_size)
        self.free += sequence.blocks - blocks
        sequence.blocks = blocks
        sequence.compacted_blocks += self._target(span)
        sequence.slots += span.slots
        sequence.compacted_end = span.end
        sequence.span = None
        self.outcome.compactions += 1

    def _finish(self, sequence: _Sequence) -> bool:
        if sequence.done:
            self._release(sequence)
        return sequence.done
