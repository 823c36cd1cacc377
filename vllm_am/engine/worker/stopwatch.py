"""How long slices take on the device, without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from vllm_am.engine.messages import SliceReport


class Stopwatch:
    """Times what is done one thing after the other.

    On a GPU the host is done long before the device is: events stand in its queue before and behind
    the work, and are read once the device has passed them, some steps later.

    Args:
        device: that works.
        clock: of the host, in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._on_gpu = device.type == "cuda"
        self._stopped: deque[tuple[float | torch.cuda.Event, SliceReport]] = deque()
        self._ends: deque[torch.cuda.Event] = deque()

    def start(self) -> float | torch.cuda.Event:
        """Before the work; for :meth:`stop`."""
        return self._event() if self._on_gpu else self._clock()

    def stop(self, started: float | torch.cuda.Event, report: SliceReport) -> None:
        """Behind the work.

        Args:
            report: of the work, without its time.
        """
        if isinstance(started, float):
            report = replace(report, seconds=self._clock() - started)
        else:
            self._ends.append(self._event())
        self._stopped.append((started, report))

    @property
    def running(self) -> bool:
        """Something was stopped and not yet told of."""
        return bool(self._stopped)

    def finished(self) -> Iterator[SliceReport]:
        """What was stopped and is over, in order, each once."""
        while self._stopped:
            started, report = self._stopped[0]
            if not isinstance(started, float):
                if not self._ends[0].query():
                    return
                milliseconds = started.elapsed_time(self._ends.popleft())
                report = replace(report, seconds=milliseconds / 1000)
            self._stopped.popleft()
            yield report

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
