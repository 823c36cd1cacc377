"""How much of the compactions under way one engine step takes on: a budget in time.

Everybody's tokens wait for what a step does beside them, so that is bounded in seconds. What a
head takes is known in arithmetic (``vllm_am.compaction.work``); how long that takes here, with this
method, beside whatever else runs on the machine, is learned from the workers' reports.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from vllm_am.compaction.work import fit_work, statistics_work
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.messages import SliceReport

#: Multiplications per second before anything was measured, by device: what good kernels reach, so
#: that no compaction is left out for a guess. Slices are sized as if it took CAUTION times as long.
FIRST_GUESS = {"cuda": 1e14, "cpu": 5e10}
CAUTION = 10
#: Weight of a new measurement beside all earlier ones.
LATEST = 0.5
#: Steps whose median is what the model's own steps take; and the least that it is taken for.
STEPS, LEAST_SECONDS = 16, 0.002


@dataclass(frozen=True)
class JobWork:
    """What the heads of one compaction take, each."""

    measure: float
    """Of the statistics that pages are divided by; 0 where they are not."""
    fits: tuple[float, ...]
    """By head."""
    measures: bool = True
    """Whether the heads are measured before they are fitted."""

    @property
    def rounds(self) -> tuple[bool, ...]:
        """Whether each round measures: at first, where anything is measured."""
        return (True, False) if self.measures else (False,)

    def of(self, measures: bool, head: int) -> float:
        """Of one head, in one round."""
        return self.measure if measures else self.fits[head]


class Pace:
    """Seconds for work, and how many of them a step has.

    Args:
        limits: of the engine.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._pauses = limits.pauses_fits
        self._usual, self._pressed = limits.config.step_seconds(limits.device_type)
        guess = 1 / FIRST_GUESS.get(limits.device_type, FIRST_GUESS["cuda"])
        self._seconds_per_work = {True: guess, False: guess}
        self._measured: set[bool] = set()
        self._adapts = limits.config.step_ms is None
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._begun: float | None = None
        """When the last step began; None where nobody was served behind it."""
        self._fit_seconds = 0.0
        """What fits have added since then."""
        self.pressed = False
        """Somebody waits for blocks in this step."""
        self.alone = False
        """Nobody is served in this step."""

    @property
    def step_seconds(self) -> float:
        """What compaction may add to this step."""
        if self.pressed:
            return self._pressed
        if not self._adapts or self.alone or not self._steps:
            return self._usual
        return min(self._usual, max(LEAST_SECONDS, statistics.median(self._steps)))

    def begin_step(self, now: float) -> None:
        """The time from one to the next is a step's, while somebody is served."""
        if self._begun is not None:
            self.note_step(now - self._begun - self._fit_seconds)
        self._begun, self._fit_seconds = now, 0.0

    def note_fits(self, seconds: float) -> None:
        """What fits have added to this step."""
        self._fit_seconds += seconds

    def end_steps(self) -> None:
        """Nobody is served any more."""
        self._begun = None

    def note_step(self, seconds: float) -> None:
        """A step has taken so long, without its fits."""
        self._steps.append(seconds)

    def work(
        self, positions: int, tokens: int, slots: int, by_head: tuple[int, ...] | None = None
    ) -> JobWork:
        """What a compaction takes.

        Args:
            positions: whose queries it reads.
            tokens: of the span.
            slots: per head, on average.
            by_head: slots of each head, once they are known.
        """
        limits = self._limits
        queries, dim = positions * limits.queries_per_kv, limits.head_size
        measure = statistics_work(queries, tokens, dim)
        known = limits.config.measures_scores and limits.keeps_statistics(queries, tokens)
        beside = 0.0 if known else measure
        every = by_head if by_head and len(by_head) == limits.heads else (slots,) * limits.heads
        fits = tuple(beside + fit_work(queries, tokens, each, dim) for each in every)
        measures = limits.config.measures_scores
        return JobWork(measure if measures else 0.0, fits, measures)

    def seconds(self, measures: bool, work: float) -> float:
        """What so much work takes, as far as anybody knows."""
        return self._seconds_per_work[measures] * work

    def cautious_seconds(self, measures: bool, work: float) -> float:
        """What it may take: more, until it was measured."""
        return self.seconds(measures, work) * (1 if measures in self._measured else CAUTION)

    def seconds_of(self, job: JobWork) -> float:
        """Of a whole compaction."""
        fitted = self.seconds(False, sum(job.fits))
        return self.seconds(True, job.measure * len(job.fits)) + fitted

    def steps(self, tokens: int, slots: int) -> int:
        """Steps that a compaction takes where there is no other, of a text that was just read."""
        positions = min(self._limits.sample_positions, tokens)
        work = self.work(positions, tokens, slots)
        steps = math.ceil(self.seconds_of(work) / self.step_seconds)
        if not self._pauses:  # a head in each, at least
            steps = min(steps, len(work.rounds) * len(work.fits))
        return max(1, steps)

    def note(self, report: SliceReport) -> None:
        """Learn from a slice that is done."""
        if report.work <= 0:
            return
        found = report.seconds / report.work
        if report.measures in self._measured:
            found = LATEST * found + (1 - LATEST) * self._seconds_per_work[report.measures]
        self._measured.add(report.measures)
        self._seconds_per_work[report.measures] = found
