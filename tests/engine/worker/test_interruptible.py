"""Work that is put aside when its time is up."""

from __future__ import annotations

import gc
import math
import random
import time
import weakref

import pytest
import torch

from tests.engine import driver
from tests.engine.driver import Ask, random_prompt
from vllm_am.compaction import compact
from vllm_am.compaction.streaming import pause_point


@pytest.fixture
def aside(plugin):
    from vllm_am.engine.worker.interruptible import Interruptible

    return Interruptible()


def test_work_goes_on_where_it_was_put_aside(aside):
    done = []

    def work():
        for i in range(3):
            done.append(i)
            pause_point()

    aside.begin(work)
    assert done == [] and aside.busy
    assert [aside.go_on(until=0) for _ in range(4)] == [False, False, False, True]
    assert done == [0, 1, 2] and not aside.busy
    pause_point()  # of nobody


def test_with_time_left_it_is_not_put_aside(aside):
    aside.begin(lambda: [pause_point() for _ in range(3)])
    assert aside.go_on(until=math.inf)


def test_its_clock_stands_still_meanwhile(aside):
    times = []

    def work():
        begun = aside.clock()
        pause_point()
        times.append(aside.clock() - begun)

    aside.begin(work)
    aside.go_on(until=0)
    time.sleep(0.2)
    aside.go_on(until=0)
    assert times[0] < 0.1


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_cancelled_leaves_nothing(aside, begun):
    ended, held = [], []

    def work():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        try:
            pause_point()
            ended.append("finished")
        finally:
            ended.append("left")

    aside.begin(work)
    if begun:
        aside.go_on(until=0)
    aside.cancel()
    gc.collect()
    assert not aside.busy and ended == (["left"] if begun else [])
    assert all(reference() is None for reference in held)
    aside.begin(lambda: ended.append("next"))
    assert aside.go_on(until=0) and ended[-1] == "next"


def test_what_is_raised_is_raised_there(aside):
    def work():
        pause_point()
        raise KeyError("x")

    aside.begin(work)
    assert not aside.go_on(until=0)
    with pytest.raises(KeyError):
        aside.go_on(until=0)


@pytest.mark.parametrize("method", ["highest-attention", "omp-fast", "evict-max"])
def test_a_fit_in_pieces_is_the_same_to_the_bit(aside, method):
    """Whatever else is computed in between."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 600, 32, generator=generator)
    queries = torch.randn(3, 900, 32, generator=generator)
    options = {"ratio": 0.2, "method": method, "chunk_bytes": 1 << 18}
    expected = compact(keys, values, queries, **options)
    found = []
    aside.begin(lambda: found.append(compact(keys, values, queries, **options)))
    pieces = 0
    while not aside.go_on(until=0):
        pieces += 1
        with torch.inference_mode():
            torch.randn(50, 50) @ torch.randn(50, 50)
    assert pieces > 5
    for name in ("keys", "values", "bias"):
        assert torch.equal(getattr(found[0], name), getattr(expected, name))


#: So little time that every fit is put aside at every pause.
PIECES = {"ratio": 0.25, "threshold": 256, "step_ms": 0.001, "pressed_step_ms": 0.001}


@pytest.mark.engine
@pytest.mark.slow
def test_an_engine_fits_in_pieces(tiny_model):
    """The sequence is served on meanwhile, and gets what it would get from a whole fit."""
    ask = Ask(random_prompt(random.Random(0), 500), 340, {"kv_compaction": "force"})
    segments, steps = [], []
    for bound in (0.001, 1e6):
        options = {**PIECES, "threshold": 490, "step_ms": bound, "pressed_step_ms": bound}
        with driver.start(tiny_model, options, pauses=True) as engine:
            commit = engine.scheduler.compaction.commits.commit

            def spy(job, report, step, commit=commit, engine=engine):
                fitting = engine.worker._compaction.fitting
                pages = torch.cat(fitting.running[job.job_id].lists)
                segments.append((fitting.kv.pages[pages].clone(), fitting.kv.bias[pages].clone()))
                commit(job, report, step)

            engine.scheduler.compaction.commits.commit = spy
            engine.run([ask])
            assert engine.totals.compactions == 1 and not engine.totals.failures
            steps.append(len(engine.totals.step_seconds))
            fitting = engine.worker._compaction.fitting
            assert not fitting.running and not fitting.waiting and not fitting.aside.busy
    assert all(map(torch.equal, *segments))
    assert steps[0] > steps[1] == 1


@pytest.mark.engine
@pytest.mark.slow
def test_a_request_goes_in_the_middle_of_its_fit(tiny_model):
    """Aborted or preempted: the fit is dropped where it stands, and the next one is made."""
    asks = [
        Ask(random_prompt(random.Random(i), 500), 700, {"kv_compaction": "force"}, arrives=i)
        for i in range(2)
    ]
    asks[0] = Ask(asks[0].prompt, 700, {"kv_compaction": "force"}, aborted=12)
    busy = []

    def watch(engine, step):
        fitting = engine.worker._compaction.fitting
        busy.append(fitting.aside.busy)
        if step == 30:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with driver.start(tiny_model, PIECES, pauses=True) as engine:
        engine.before_step = watch
        engine.run(asks)
        fitting = engine.worker._compaction.fitting
        assert any(busy[:12]) and any(busy[13:30])
        assert engine.totals.compactions >= 1 and not engine.totals.failures
        assert not fitting.running and not fitting.waiting and not fitting.aside.busy
        assert engine.used_blocks == 0


@pytest.mark.engine
@pytest.mark.parametrize("stage", ["attention_statistics", "compact"])
def test_a_fit_in_pieces_that_fails_comes_to_an_end(tiny_model, monkeypatch, stage):
    """In the first slice or a later one: the sequence stays exact, nothing is left behind."""
    from vllm_am.compaction import FitError
    from vllm_am.engine.worker import fitting

    def fails(*args, **kwargs):
        raise FitError("singular", heads=[0])

    monkeypatch.setattr(fitting, stage, fails)
    ask = Ask(random_prompt(random.Random(0), 500), 300, {"kv_compaction": "force"})
    with driver.start(tiny_model) as engine:
        exact = engine.run([ask])["0"]
    with driver.start(tiny_model, {**PIECES, "threshold": 490}, pauses=True) as engine:
        assert engine.run([ask])["0"] == exact
        assert engine.totals.failures == {"singular": 1} and engine.used_blocks == 0
        state, jobs = engine.worker._compaction.fitting, engine.scheduler.compaction.jobs
        assert not state.running and not state.waiting and not jobs.all
