"""On-policy: every layer is fitted inside the forward pass that brings its queries."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import asdict

import pytest
import torch

from tests.engine import driver
from tests.engine.driver import Ask, random_prompt

pytestmark = pytest.mark.engine

REPEAT = {
    "ratio": 0.1,
    "threshold": 256,
    "recent_tokens": 16,
    "queries": "repeat-prefill",
    "query_pool_share": 1.0,
}
ON_POLICY = {**REPEAT, "on_policy": True}
#: Two ranks on one machine: each its own core, else OpenMP threads fight.
OWN_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
PROMPT = random_prompt(random.Random(3), 400)


def _watch(engine):
    """Every fit that was sent, and its queries by layer when it was over."""
    found = []
    finish = engine.worker._compaction.fitting._finish
    begin_step = engine.worker._compaction.begin_step
    fits = {}

    def spy_begin(step, gone):
        fits.update({fit.job_id: fit for fit in (step.fits if step else ())})
        return begin_step(step, gone)

    def spy_finish(job_id):
        pool = engine.worker._compaction.queries.values()
        fit = fits[job_id]
        found.append((fit, [layer[fit.query_slots].clone() for layer in pool]))
        return finish(job_id)

    engine.worker._compaction.begin_step = spy_begin
    engine.worker._compaction.fitting._finish = spy_finish
    return found


@pytest.mark.parametrize("budgets", ["global", "uniform"])
def test_queries_come_through_the_layers_compacted_before(tiny_model, budgets):
    """What each layer was fitted on is what arrives there once the sequence *is* compacted: in one
    pass the same as after one pass for each layer. Off-policy that is so in the first layer only.
    """
    from vllm_am.engine.scheduler.planner import Span
    from vllm_am.engine.scheduler.study import Study

    off_policy, on_policy, again = [], [], []
    with driver.start(tiny_model, {**REPEAT, "budgets": budgets}) as engine:
        found = _watch(engine)
        engine.run([Ask(PROMPT, 20)])
        ((fit, off_policy),) = found
        assert fit.on_policy is None
    with driver.start(tiny_model, {**ON_POLICY, "budgets": budgets}) as engine:
        found = _watch(engine)
        scheduler, worker = engine.scheduler, engine.worker
        plans, read_again = [], ""
        start_pass = scheduler._start_pass

        def spy_start(study, plan):
            plans.append(plan)
            return start_pass(study, plan)

        scheduler._start_pass = spy_start

        def watch(engine, step):
            """Behind the compacted sequence the same pass once more."""
            nonlocal read_again
            if engine.totals.compactions and not read_again:
                (parent,) = scheduler.running
                (segment,) = scheduler.compaction.blocks.segments(parent.request_id)
                span = Span(parent.request_id, segment.start, segment.end, segment.slots)
                study = scheduler.studies[parent.request_id] = Study(parent, span, 0, deque())
                read_again = start_pass(study, plans[0])
            for study in scheduler.studies.values():
                if read_again and not study.running and not again:
                    slots = scheduler.compaction.query_pool.slots(study.owners["repeat-prefill"])
                    pool = worker._compaction.queries.values()
                    again.extend(layer[slots].clone() for layer in pool)

        engine.before_step = watch
        engine.run([Ask(PROMPT, 20)])
        ((fit, on_policy),) = found
        assert fit.on_policy is not None and len(fit.on_policy.pass_ids) == len(plans) == 1
        assert engine.totals.compactions == 1 and not engine.totals.failures
        assert not engine.totals.reference_shortfalls and engine.used_blocks == 0
    assert len(again) == len(on_policy) > 1
    for layer, (fitted, later, before) in enumerate(zip(on_policy, again, off_policy, strict=True)):
        torch.testing.assert_close(fitted, later, rtol=1e-3, atol=1e-3)
        moved = float((fitted - before).abs().max())
        assert moved < 1e-4 if layer == 0 else moved > 1e-2, (layer, moved)


def test_one_sequence_after_the_other_where_a_step_reads_no_two(tiny_model):
    asks = [Ask(random_prompt(random.Random(i), 400), 30) for i in range(3)]
    with driver.start(tiny_model, ON_POLICY, max_num_batched_tokens=512) as engine:
        found = _watch(engine)
        engine.run(asks)
        assert len(found) == 3 and all(fit.on_policy is not None for fit, _ in found)
        assert engine.totals.compactions == 3 and not engine.totals.reference_shortfalls


@pytest.mark.slow
def test_without_room_in_one_step_the_fit_comes_behind_the_passes(tiny_model):
    """A span that no step reads in whole: what fits of it is; where nothing does, as if off."""
    some = {**ON_POLICY, "pass_tokens": 64}
    with driver.start(tiny_model, some, max_num_batched_tokens=256) as engine:
        found = _watch(engine)
        engine.run([Ask(PROMPT, 20)])
        ((fit, _),) = found
        assert fit.on_policy is not None and len(fit.on_policy.pass_ids) == 4, "of six"
        assert not engine.totals.reference_shortfalls
    with driver.start(tiny_model, ON_POLICY, max_num_batched_tokens=256) as engine:
        found = _watch(engine)
        engine.run([Ask(PROMPT, 20)])
        ((fit, _),) = found
        assert fit.on_policy is None
        assert engine.totals.compactions == engine.totals.reference_shortfalls == 1
    short = {"queries": "prompts", "reference_prompts": {"prompts": [[7]]}, "prompts_tokens": 1}
    with driver.start(tiny_model, {**ON_POLICY, **short}) as engine:
        found = _watch(engine)
        engine.run([Ask(PROMPT, 20)])
        ((fit, _),) = found
        assert fit.on_policy is None, "as short as a decode, which a graph might replay"
        assert engine.totals.compactions == engine.totals.reference_shortfalls == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fit", "forward", "measure"])
def test_a_failure_leaves_everybody_exact(tiny_model, monkeypatch, kind):
    """In the middle of a forward pass that also computes another sequence's next token."""
    from vllm_am.compaction import FitError
    from vllm_am.engine.messages import INTERNAL_ERROR
    from vllm_am.engine.worker import fitting

    asks = [Ask(PROMPT, 30), Ask(random_prompt(random.Random(4), 50), 40)]
    with driver.start(tiny_model) as engine:
        expected = engine.run(asks)
    compact, calls = fitting.compact, []

    def fails_in_the_second_layer(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise FitError("singular", heads=[0])
        return compact(*args, **kwargs)

    def fails(*args, **kwargs):
        raise MemoryError

    if kind == "fit":
        monkeypatch.setattr(fitting, "compact", fails_in_the_second_layer)
    elif kind == "measure":
        monkeypatch.setattr(fitting, "attention_statistics", fails)
    with driver.start(tiny_model, ON_POLICY) as engine:
        state = engine.worker._compaction
        if kind == "forward":  # as if a graph had been replayed instead
            monkeypatch.setattr(state, "fit_on_policy", lambda layer: None)
        found = _watch(engine)
        assert engine.run(asks) == expected
        assert found and all(fit.on_policy is not None for fit, _ in found)
        reason = {"fit": "singular", "forward": INTERNAL_ERROR, "measure": "out-of-memory"}[kind]
        assert engine.totals.failures == {reason: 1} and not engine.totals.compactions
        assert engine.used_blocks == 0 and not state.sequences and not state.fitting.running


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"v2": True, "force_async": True},
        {"cuda_backend": True},
        {"options": {"tensor_parallel_size": 2}, "environment": OWN_CORES},
        {
            "options": {"pipeline_parallel_size": 2, "enforce_eager": False},
            "environment": OWN_CORES,
        },
    ],
    ids=["v2-async", "cuda", "tp", "pp"],
)
def test_everywhere(tiny_model, case):
    """At ratio 1 stock vLLM's tokens, wherever layers and heads are."""
    asks = [Ask(PROMPT, 30), Ask(random_prompt(random.Random(4), 300), 40, arrives=2)]
    with driver.start(tiny_model) as engine:
        expected = engine.run(asks)
    result = driver.run_case(
        {
            "model": str(tiny_model),
            "asks": [asdict(a) for a in asks],
            "kv_compaction": {**ON_POLICY, "ratio": 1.0},
            **case,
        }
    )
    assert result["outputs"] == expected
    assert result["compactions"] >= 2 and not result["failures"]
    assert result["reference_tokens"] > 0 and not result["reference_shortfalls"]
