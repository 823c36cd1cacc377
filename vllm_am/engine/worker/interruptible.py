"""Work that is put aside when its time is up, and taken up again in the next step: on a CPU.

A head of many slots takes longer than a step may, and cannot be cut in two. So its fit runs as a
coroutine (a greenlet: the same thread, with another stack), which comes back wherever the
mathematics passes from one block to the next (``vllm_am.compaction.streaming.pause_point``). Not a
thread: that one would have threads of its own, on the cores that the model's are bound to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from greenlet import GreenletExit, greenlet

from vllm_am.compaction.streaming import pausing


class Interruptible:
    """At most one piece of work at a time."""

    def __init__(self) -> None:
        self._task: greenlet | None = None
        self._until = math.inf
        self._aside = 0.0
        """Seconds for which work was put aside."""

    def clock(self) -> float:
        """Seconds on a clock that stands still while the work is put aside. For the work itself."""
        return time.perf_counter() - self._aside

    @property
    def busy(self) -> bool:
        """Some work is not done yet."""
        return self._task is not None

    def begin(self, work: Callable[[], None]) -> None:
        """Take on some work, of which nothing is done yet."""
        assert not self.busy, "one at a time"

        def run() -> None:
            with pausing(self._pause):
                work()

        self._task = greenlet(run)

    def go_on(self, until: float) -> bool:
        """Do some of it.

        Args:
            until: when to stop, by ``time.perf_counter``; at least up to the next pause.

        Returns:
            whether it is done.
        """
        assert self._task is not None
        self._until = until
        self._task.switch()
        if self._task.dead:
            self._task = None
        return not self.busy

    def cancel(self) -> None:
        """It is not wanted any more."""
        task, self._task = self._task, None
        if task:  # it has begun
            task.throw(GreenletExit)

    def _pause(self) -> None:
        stopped = time.perf_counter()
        if stopped >= self._until:
            outside = greenlet.getcurrent().parent
            assert outside is not None, "only work pauses"
            outside.switch()
            self._aside += time.perf_counter() - stopped
