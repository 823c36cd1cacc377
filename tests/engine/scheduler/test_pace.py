"""What a step takes on: heads by the time that they were measured to take."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_am.compaction.work import fit_work, statistics_work
from vllm_am.config import CompactionConfig, Threshold

pytestmark = pytest.mark.usefixtures("plugin")

#: 4 layers of 2 heads.
HEADS = 8
#: Tokens of a span, positions whose queries are read, slots per head.
SPAN, POSITIONS, SLOTS = 1024, 1024, 96


@pytest.fixture
def make(plugin):
    """Jobs of an engine whose blocks and query pool are always there."""
    from vllm_am.engine.limits import EngineLimits
    from vllm_am.engine.messages import Segment
    from vllm_am.engine.scheduler.jobs import Jobs
    from vllm_am.engine.scheduler.pace import Pace
    from vllm_am.engine.scheduler.planner import Span
    from vllm_am.engine.scheduler.reference_queries import JobQueries

    class Engine:
        def __init__(self, pauses=False, **options):
            limits = EngineLimits(
                config=CompactionConfig.from_dict(options),
                threshold=Threshold(tokens=512),
                block_size=32,
                max_model_len=4096,
                num_layers=4,
                kv_heads=2,
                queries_per_kv=4,
                head_size=64,
                in_flight_tokens=2048,
                device_type="cpu",
                ranks=1 if pauses else 2,
            )
            blocks = SimpleNamespace(reserve_target=self.reserve, detached={})
            pool = SimpleNamespace(
                can_hold=lambda count: True, forget=lambda ids: None, hold=lambda slots: None
            )
            self.pace = Pace(limits)
            self.jobs = Jobs(limits, blocks, pool, self.pace)

        @staticmethod
        def reserve(job_id, span):
            target = tuple(range(-(-span.slots // 32)))
            source = tuple(range((span.end - span.start) // 32))
            return Segment(span.start, span.end, span.slots, target), source

        def start(self, name="a", tokens=SPAN, slots=SLOTS):
            found = np.arange(POSITIONS)
            queries = JobQueries(found, found, None)
            request = SimpleNamespace(request_id=name)
            return self.jobs.start(
                request, Span(name, 32, 32 + tokens, slots), queries, False, None
            )

        def step(self, seconds_per_work=None):
            """The slices of a step; their times are reported."""
            from vllm_am.engine.messages import SliceReport

            found = list(self.jobs.slices())
            for fit in found if seconds_per_work else ():
                report = SliceReport(
                    fit.job_id, fit.measures, fit.heads, fit.work, fit.work * seconds_per_work
                )
                self.jobs.note(report)
            return [(f.request_id, f.measures, f.heads.begin, f.heads.end) for f in found]

    return Engine


#: Seconds per multiplication at which the statistics of one head take 10 ms.
RATE = 0.01 / statistics_work(4 * POSITIONS, SPAN, 64)


def test_all_of_a_fit_where_there_is_time(make):
    engine = make(step_ms=1e6)
    engine.start()
    assert engine.step() == [("a", True, 0, HEADS), ("a", False, 0, HEADS)]
    assert engine.step() == []


def test_a_head_per_step_where_there_is_none(make):
    engine = make(step_ms=0.001)
    engine.start()
    found = [engine.step(RATE) for _ in range(2 * HEADS + 1)]
    every = [(measures, head) for measures in (True, False) for head in range(HEADS)]
    assert found == [[("a", measures, head, head + 1)] for measures, head in every] + [[]]


def test_slices_are_sized_by_what_others_took(make):
    """Once a slice was measured, as many heads as fit: three of 10 ms in 35 ms, then the rest."""
    engine = make(step_ms=35)
    engine.start()
    first = engine.step(RATE)[0]
    assert first[3] < 3, "a guess is not trusted"
    sizes = []
    while (found := engine.step(RATE)) and found[0][1]:
        sizes.append(found[0][3] - found[0][2])
    assert sizes[0] == 3
    assert sum(sizes) + first[3] == HEADS


def test_a_machine_that_gets_slower_gets_less(make):
    engine = make(step_ms=35)
    engine.start(tokens=SPAN)
    while engine.step(RATE):
        pass
    sizes = []
    for name in "bcdefgh":
        engine.start(name)
        sizes.append(engine.step(4 * RATE)[0][3])
        engine.jobs.running.clear()
    assert sizes[0] == 3 and sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)


def test_while_somebody_waits_a_step_takes_more(make):
    engine = make(step_ms=35, pressed_step_ms=1e6)
    engine.start()
    engine.step(RATE)
    engine.pace.pressed = True
    assert engine.step(RATE)[-1] == ("a", False, 0, HEADS)


def test_that_comes_first_which_gives_back_most(make):
    """The same blocks for less work; who began earlier does not matter."""
    engine = make(step_ms=0.001)
    engine.start("long", tokens=2048, slots=1024)
    engine.start("short")
    assert engine.step(RATE)[0][0] == "short"


def test_heads_of_known_sizes_are_weighed_by_them(make):
    from vllm_am.engine.messages import HeadRange, SliceReport

    engine = make(step_ms=1e6)
    job = engine.start()
    slots = (32, 32, 32, 32, 32, 32, 32, 544)
    engine.jobs.note(SliceReport(job.job_id, True, HeadRange(0, 8, 8), 1.0, 1.0, slots))
    works = [job.work.of(False, head) for head in range(HEADS)]
    assert works == [fit_work(4 * POSITIONS, SPAN, each, 64) for each in slots]
    assert works[-1] > 20 * works[0]


def test_steps_of_a_fit(make):
    engine = make(step_ms=35)
    # A head is measured in 10 ms; the fit of one is less than that.
    engine.start()
    engine.step(RATE)
    whole = HEADS * (0.01 + RATE * fit_work(4 * SPAN, SPAN, SLOTS, 64))
    engine.pace._seconds_per_work = {True: RATE, False: RATE}
    assert engine.pace.steps(SPAN, SLOTS) == -(-whole // 0.035)
    engine.pace.pressed = True
    assert engine.pace.steps(SPAN, SLOTS) == -(-whole // 0.35)
    assert make(step_ms=1e-9).pace.steps(SPAN, SLOTS) == 2 * HEADS, "a head in each, at least"


def test_where_fits_are_put_aside_there_is_always_something_to_do(make):
    """More than two steps' worth is sent and not reported yet, whatever is done of it."""
    from vllm_am.engine.messages import HeadRange, SliceReport

    engine = make(pauses=True, step_ms=34)
    engine.start()
    engine.pace._seconds_per_work, engine.pace._measured = {True: RATE, False: RATE}, {True, False}
    assert engine.step() == [("a", True, 0, 6), ("a", True, 6, 7)], "70 of 68 ms"
    assert engine.step() == [], "nothing was reported"
    work = 6 * statistics_work(4 * POSITIONS, SPAN, 64)
    engine.jobs.note(SliceReport(0, True, HeadRange(0, 6, 8), work, work * RATE))
    following = engine.step()
    assert following[0] == ("a", True, 7, 8) and following[1][:3] == ("a", False, 0)
    assert make(pauses=True, step_ms=1e-6).pace.steps(SPAN, SLOTS) > 2 * HEADS


@pytest.mark.parametrize(
    ("options", "device", "usual", "pressed"),
    [
        ({}, "cpu", 0.05, 0.5),
        ({}, "cuda", 0.02, 0.2),
        ({"step_ms": 5}, "cuda", 0.005, 0.05),
        ({"step_ms": 5, "pressed_step_ms": 5}, "cpu", 0.005, 0.005),
        ({"pressed_step_ms": 10}, "cpu", 0.01, 0.01),
        ({"pressed_step_ms": 100}, "cpu", 0.05, 0.1),
    ],
)
def test_the_time_of_a_step(options, device, usual, pressed):
    found = CompactionConfig.from_dict(options).step_seconds(device)
    assert found == pytest.approx((usual, pressed))


def test_without_a_bound_a_step_of_fits_is_as_long_as_one_of_the_model(make):
    """Their median: a prefill now and then does not count; within the device's bound."""
    pace = make().pace
    assert pace.step_seconds == 0.05, "nothing is known"
    for seconds in (0.004, 0.3, 0.004, 0.005, 0.004):
        pace.note_step(seconds)
    assert pace.step_seconds == 0.004
    pace.alone = True
    assert pace.step_seconds == 0.05, "nobody is in the way"
    pace.alone, pace.pressed = False, True
    assert pace.step_seconds == 0.5
    pace.pressed = False
    for _ in range(16):
        pace.note_step(0.0001)
    assert pace.step_seconds == 0.002
    for _ in range(16):
        pace.note_step(0.2)
    assert pace.step_seconds == 0.05
    given = make(step_ms=30).pace
    given.note_step(0.004)
    assert given.step_seconds == 0.03


def test_a_fit_without_queries_is_measured_all_the_same(make):
    """It fails in the measurement, with which the workers begin."""
    assert make().pace.work(0, SPAN, SLOTS).rounds == (True, False)
