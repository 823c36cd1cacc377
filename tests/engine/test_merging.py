"""Merging: segments that outgrow ``merge_slots`` become one, in the running engine."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from tests.engine import driver
from tests.engine.driver import BLOCK, Ask, mixed_asks, random_prompt

pytestmark = pytest.mark.engine

LIMIT = 8 * BLOCK
#: A segment of two blocks for every span of eight.
MERGING = {
    "ratio": 0.25,
    "threshold": 10 * BLOCK,
    "recent_tokens": BLOCK,
    "merge_slots": LIMIT,
}
SMALL_STEPS = {"max_num_batched_tokens": 96, "num_gpu_blocks_override": 113}


@pytest.mark.parametrize("budgets", ["global", "uniform"])
def test_compacted_part_stays_bounded(tiny_model, budgets):
    """A long prompt in a small pool: the compacted part never grows beyond limit plus a segment."""
    most, counts, slices = 0, set(), []

    def watch(engine, step):
        nonlocal most
        manager = engine.scheduler.compaction.blocks
        for request in engine.scheduler.running:
            segments = manager.segments(request.request_id)
            slots = sum(s.slots for s in segments)
            held = sum(len(s.block_ids) for s in segments)
            assert slots == held * BLOCK
            assert all(a.end == b.start for a, b in itertools.pairwise(segments))
            most = max(most, slots)
            counts.add(len(segments))
            sequence = engine.worker._compaction.sequences.get(request.request_id)
            if sequence is not None:
                pages = [page for ids in sequence.lists for page in ids.tolist()]
                assert len(pages) == len(set(pages)), "a page has two heads"

    with driver.start(
        tiny_model, {**MERGING, "budgets": budgets}, max_model_len=6000, **SMALL_STEPS
    ) as engine:
        issue = engine.scheduler.compaction.jobs.slices

        def spy():
            for fit in issue():
                slices.append(fit)
                yield fit

        engine.scheduler.compaction.jobs.slices = spy
        engine.before_step = watch
        outputs = engine.run([Ask(random_prompt(random.Random(3), 5000), 300)])
        assert len(outputs["0"]) == 300
        totals = engine.totals
        assert not totals.failures
        assert totals.merges >= 5 and totals.compactions > totals.merges
        assert (
            engine.used_blocks == 0
            and engine.scheduler.compaction.query_pool.named_owners() == set()
        )
    assert 1 in counts and max(counts) >= 3
    segment = max(s.segment.slots for s in slices if not s.merges)
    assert LIMIT < most <= LIMIT + segment
    merged = [s for s in slices if s.merges]
    assert {s.segment.slots for s in merged} == {LIMIT}
    assert {s.segment.start for s in merged} == {BLOCK}, "from the first segment on"
    assert all((s.query_shifts > 0).any() for s in merged), "queries of compacted tokens"


def test_bias_is_carried(tiny_model):
    """The merged segment has the attention mass of the segments it replaces, not of their bare
    keys: without their bias the mass would be off by several times as much."""
    from vllm_am.compaction.attend import attend
    from vllm_am.compaction.pages import read_segments

    carried, bare, slices = [], [], {}
    # What a random model copies by chance is not what this is about.
    options = {**MERGING, "budgets": "global"}
    with driver.start(tiny_model, options, max_model_len=6000, **SMALL_STEPS) as engine:
        state = engine.worker._compaction
        run, activate = state.fitting._run, state._activate

        def spy_run(fit, source_pages):
            slices[fit.job_id] = fit
            return run(fit, source_pages)

        def spy_activate(activation):
            if not activation.replaces:
                return activate(activation)
            segments = read_segments(state.kv, state.sequences[activation.request_id].padded)
            activate(activation)
            merged = read_segments(state.kv, state.sequences[activation.request_id].padded)
            slots = torch.as_tensor(slices[activation.job_id].query_slots)
            sampled = torch.stack([layer[slots] for layer in state.fitting.queries])
            grouped = sampled.unflatten(2, (state.kv.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
            queries = grouped.flatten(0, 1).flatten(1, 2)  # [heads, N, D]
            keys, values, bias = segments
            _, expected = attend(queries, keys, values, bias)
            _, got = attend(queries, *merged)
            _, without = attend(queries, keys, values, torch.where(bias.isneginf(), bias, 0.0))
            some = expected.isfinite() & got.isfinite()  # a head may have been left without pages
            carried.append(float((got - expected)[some].abs().mean()))
            bare.append(float((without - expected)[some].abs().mean()))

        state.fitting._run, state._activate = spy_run, spy_activate
        engine.run([Ask(random_prompt(random.Random(3), 5000), 20)])
    assert len(carried) >= 5
    assert all(b > 4 * c for b, c in zip(bare, carried, strict=True))


def test_failed_merge_leaves_the_segments(tiny_model, monkeypatch):
    """It is tried again only when there is another segment, and nothing is lost or changed."""
    from vllm_am.compaction import FitError
    from vllm_am.compaction.pages import read_segments
    from vllm_am.engine.worker import fitting

    compact, before, unchanged = fitting.compact, {}, []

    def fails_on_merges(*args, key_bias, **kwargs):
        if key_bias is not None:
            raise FitError("singular", heads=[0])
        return compact(*args, key_bias=key_bias, **kwargs)

    monkeypatch.setattr(fitting, "compact", fails_on_merges)
    with driver.start(tiny_model, MERGING, max_model_len=6000, **SMALL_STEPS) as engine:
        scheduler, state = engine.scheduler, engine.worker._compaction
        run, give_up = state.fitting._run, scheduler.compaction.failures.give_up

        def held(request_id):
            """The segments, and what their pages hold."""
            pages = state.sequences[request_id].padded
            segments = scheduler.compaction.blocks.segments(request_id)
            return segments, pages, *read_segments(state.kv, pages)

        def spy_run(fit, source_pages):
            if fit.merges and fit.measures and fit.heads.begin == 0:
                before[fit.job_id] = held(fit.request_id)
            return run(fit, source_pages)

        def spy_give_up(job, report):
            (segments, *then), (left, *now) = before[job.job_id], held(job.request.request_id)
            unchanged.append(segments == left and all(map(torch.equal, then, now)))
            give_up(job, report)

        state.fitting._run, scheduler.compaction.failures.give_up = spy_run, spy_give_up
        outputs = engine.run([Ask(random_prompt(random.Random(5), 5000), 30)])
        assert len(outputs["0"]) == 30
        assert engine.totals.merges == 0 and engine.totals.compactions >= 4
        assert 2 <= engine.totals.failures["singular"] <= engine.totals.compactions
        assert unchanged == [True] * engine.totals.failures["singular"]
        assert engine.used_blocks == 0 and not state.fitting.running


@pytest.mark.slow
@pytest.mark.parametrize(
    ("force_async", "queries"),
    [(False, "context-rotated"), (True, "context-rotated"), (True, "repeat-prefill")],
    ids=["sync", "async", "passes"],
)
def test_accounting_under_fuzz(tiny_model, force_async, queries):
    """Aborts and preemptions amid merges, in a small pool; ownership is checked at every step."""
    rng = random.Random(17)
    asks = [
        replace(
            ask,
            max_tokens=rng.randrange(4, 60),
            aborted=ask.arrives + rng.randrange(2, 40) if rng.random() < 0.25 else None,
        )
        for ask in mixed_asks(60, seed=5, longest=700)
    ]
    options = {
        **{"ratio": 0.5, "threshold": 128, "recent_tokens": 16, "merge_slots": BLOCK},
        **{
            "max_span_tokens": 128,
            "min_span_tokens": 32,
            "queries": queries,
            "step_ms": 0.001,
            "pressed_step_ms": 1e6,
        },
    }
    preempted = 0

    def preempt(engine, step):
        nonlocal preempted
        merging = any(job.merges for job in engine.scheduler.compaction.jobs.running.values())
        if merging and preempted < 2 and step > 25:
            preempted += 1
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with driver.start(
        tiny_model,
        options,
        force_async=force_async,
        num_gpu_blocks_override=61,
        max_model_len=800,
        max_num_batched_tokens=256,
        max_num_seqs=8,
    ) as engine:
        engine.before_step = preempt
        outputs = engine.run(asks)
        scheduler, state = engine.scheduler, engine.worker._compaction
        assert engine.totals.merges > 20 and not engine.totals.failures
        assert engine.used_blocks == 0 and not state.sequences and not state.fitting.running
        assert not scheduler.compaction.jobs.running and not scheduler.compaction.sequences.known
        assert not scheduler.compaction.query_pool.named_owners()
    assert preempted == 2
    finished = {i for i, ask in enumerate(asks) if ask.aborted is None}
    assert all(len(outputs[str(i)]) == asks[i].max_tokens for i in finished)
