"""The simulation of an engine: nothing is lost, memory is what it should be; and its check."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.fleet.costs import Costs, gpu_costs, shape_of
from benchmarks.fleet.simulate import EngineShape, Simulation
from benchmarks.fleet.traces import TRAFFIC, Request
from benchmarks.folders import RECORDED
from benchmarks.gpu_suite.models import QWEN3_4B, TINY
from vllm_am.plan import make_plan

#: A step takes a millisecond, whatever is in it; a fit a hundredth of that per token.
COSTS = Costs(1e-3, 0, 0, 0, 0, 0, 1e-5, 0.05)
REQUESTS = [Request(0.1 * i, 300 + 40 * i, 200) for i in range(12)]


def engine(blocks: int, ratio: str | None = None) -> EngineShape:
    limits = make_plan(
        shape_of(TINY),
        0,
        context=2048,
        itemsize=4,
        block_size=16,
        options={"ratio": ratio or 0.1, "threshold": 256},
        in_flight_tokens=512,
    ).limits
    return EngineShape(blocks, 16, 8, 512, limits if ratio else None)


@pytest.mark.parametrize("ratio", [None, "4x", "20x"])
@pytest.mark.parametrize("blocks", [400, 130])
def test_every_token_is_written_and_every_block_comes_back(blocks, ratio):
    simulation = Simulation(engine(blocks, ratio), COSTS)
    outcome = simulation.run(REQUESTS)
    assert outcome.output_tokens == sum(request.output for request in REQUESTS)
    assert len(outcome.first_tokens) == len(REQUESTS)
    assert simulation.free == blocks
    assert (outcome.compactions > 0) == (ratio is not None)


def test_one_request_takes_the_steps_that_it_has():
    """A prompt of 700 in chunks of 512, whose last gives the first token, and 199 more."""
    outcome = Simulation(engine(400), COSTS).run([Request(0, 700, 200)])
    assert outcome.work.steps == 2 + 199
    assert outcome.seconds == pytest.approx(0.201)
    assert outcome.first_tokens == [pytest.approx(0.002)]


def test_more_fit_at_once_where_they_are_compacted():
    tight = 100  # two of them
    requests = [Request(0, 600, 400)] * 6
    exact = Simulation(engine(tight), COSTS).run(requests)
    compacted = Simulation(engine(tight, "10x"), COSTS).run(requests)
    assert compacted.mean_running > 1.3 * exact.mean_running
    assert compacted.tokens_per_second > exact.tokens_per_second


def test_a_fit_takes_as_long_as_steps_do_and_no_longer():
    """Nobody waits: then fits double steps."""
    costs = replace(COSTS, fit_tokens=1e-4)
    outcome = Simulation(engine(400, "10x"), costs).run([Request(0, 600, 400)])
    assert outcome.compactions >= 1
    assert outcome.seconds == pytest.approx(outcome.work.steps * 1e-3 + outcome.fit_seconds)
    assert outcome.fit_seconds >= 500 * 1e-4


@pytest.mark.parametrize("name", TRAFFIC)
def test_traces_have_the_statistics_that_they_say(name):
    traffic = TRAFFIC[name]
    requests = traffic.requests(20_000, seed=1, longest=1 << 20)
    assert requests == traffic.requests(20_000, seed=1, longest=1 << 20)
    assert requests[-1].arrival == pytest.approx(20_000 / traffic.rate, rel=0.05)
    medians = np.median([(r.prompt, r.output) for r in requests], axis=0)
    expected = traffic.prompt[4], traffic.output[4]
    assert medians == pytest.approx(expected, rel=0.06)


def test_costs_of_a_model_are_those_of_its_bytes():
    shape = shape_of(QWEN3_4B)
    costs = gpu_costs(shape)
    assert costs.held_tokens == pytest.approx(2 * 36 * 8 * 128 * 2 / (0.8 * 4.3e12))
    assert 2e-3 < costs.steps < 4e-3  # 8 GB of weights
    # The fit of 32,768 tokens that was measured.
    assert costs.fit_tokens * 32_768 == pytest.approx(2.25 * 0.54)


def test_the_recorded_check_is_within_15_percent():
    """Of tokens per second that the real engine gives in tight pools."""
    with (RECORDED / "fleet-check.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ratios = {(r["engine"], r["pool, contexts"]): float(r["simulated / measured"]) for r in rows}
    assert len(ratios) == 4
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios
