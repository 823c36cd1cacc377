"""Times of slices: of the host's clock, and of a device that is behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def report(plugin):
    from vllm_am.engine.messages import HeadRange, SliceReport

    return lambda job: SliceReport(job, False, HeadRange(0, 1, 1), 1.0, 0.0)


def test_on_a_cpu_by_the_clock(report):
    from vllm_am.engine.worker.stopwatch import Stopwatch

    times = iter((1.0, 1.5, 2.0, 4.0))
    watch = Stopwatch(torch.device("cpu"), lambda: next(times))
    for job in range(2):
        watch.stop(watch.start(), report(job))
    assert watch.running
    assert [(r.job_id, r.seconds) for r in watch.finished()] == [(0, 0.5), (1, 2.0)]
    assert not watch.running and not list(watch.finished())


def test_on_a_gpu_once_the_device_is_there(report, monkeypatch):
    """Nobody waits for it: a slice is told of when its end has been passed."""
    from vllm_am.engine.worker import stopwatch

    device = SimpleNamespace(at=0)

    class Event:
        recorded = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.recorded += 1
            self.number = Event.recorded

        def query(self):
            return device.at >= self.number

        def elapsed_time(self, end):
            return 10.0 * (end.number - self.number)

    monkeypatch.setattr(stopwatch.torch.cuda, "Event", Event)
    watch = stopwatch.Stopwatch(torch.device("cuda"), lambda: 0.0)
    for job in range(2):
        watch.stop(watch.start(), report(job))
    assert not list(watch.finished()) and watch.running
    device.at = 3
    assert [(r.job_id, r.seconds) for r in watch.finished()] == [(0, 0.01)]
    device.at = 4
    assert [(r.job_id, r.seconds) for r in watch.finished()] == [(1, 0.01)]
    assert not watch.running
