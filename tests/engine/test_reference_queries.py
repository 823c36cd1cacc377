"""Reference passes: requests of the engine itself, that nobody sees and nobody waits for."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from tests.engine import driver
from tests.engine.driver import BLOCK, Ask, random_prompt

pytestmark = [pytest.mark.engine]

#: Every key kept, so that outputs must be stock vLLM's whatever the queries are.
IDENTITY = {"ratio": 1.0, "threshold": 128, "recent_tokens": 16, "query_pool_share": 1.0}
PROMPTS = {"prompts": [[7, 8, 9], [11, 12, 13, 14]]}
WRITING = {"self_study_tokens": 12, "starters": ["w5 w6", "w7"]}
SOURCES = {
    "repeat": {"queries": "repeat-prefill", "pass_tokens": 128},
    "self-study": {"queries": "self-study", **WRITING},
    "prompts": {"queries": "prompts", "reference_prompts": PROMPTS, "prompts_tokens": 6},
    "random": {"queries": "random"},
    "on-policy": {"queries": {"repeat-prefill": 1, "self-study": 1}, "on_policy": True, **WRITING},
    "mixture": {
        "queries": {"repeat-prefill": 1, "self-study": 2, "context-prefill": 1, "random": 1},
        **WRITING,
    },
}


@pytest.fixture(scope="module")
def long_answers(tiny_model):
    """Requests that are compacted more than once, and stock vLLM's outputs."""
    asks = [Ask(random_prompt(random.Random(i), 300 + 30 * i), 60, arrives=i) for i in range(5)]
    with driver.start(tiny_model) as engine:
        return asks, engine.run(asks)


def _watch_fits(engine):
    """(request, start, end, query slots, random positions) of every slice that is sent."""
    fits = []

    def watch(issue):
        def spy(*args):
            for fit in issue(*args):
                drawn = fit.random_queries.positions if fit.random_queries else 0
                segment = fit.segment
                fits.append((fit.request_id, segment.start, segment.end, fit.query_slots, drawn))
                yield fit

        return spy

    engine.scheduler.compaction.jobs.slices = watch(engine.scheduler.compaction.jobs.slices)
    engine.scheduler._fits_on_policy = watch(engine.scheduler._fits_on_policy)
    return fits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "force_async"),
    [(source, False) for source in SOURCES]
    + [("repeat", True), ("mixture", True), ("on-policy", True)],
)
def test_identity_equals_stock(tiny_model, long_answers, source, force_async):
    """Passes change nobody's tokens, not those of their own parent either."""
    asks, expected = long_answers
    with driver.start(
        tiny_model, {**IDENTITY, **SOURCES[source]}, force_async=force_async
    ) as engine:
        fits = _watch_fits(engine)
        assert engine.run(asks) == expected
        assert len(engine.totals.output_errors) == engine.totals.compactions >= len(asks)
        assert not engine.totals.failures and not engine.totals.reference_shortfalls
        assert engine.used_blocks == 0
        assert (
            not engine.scheduler.studies
            and not engine.scheduler.compaction.query_pool.named_owners()
        )
        assert not engine.worker._compaction.sequences
        computed = engine.totals.reference_tokens + engine.scheduler.reference_tokens
    assert (computed > 0) == (source != "random")
    assert all(drawn > 0 for *_, drawn in fits) == (source in ("random", "mixture"))
    if source == "repeat":
        twice = Counter(request_id for request_id, _, _ in {f[:3] for f in fits})
        assert max(twice.values()) > 1, "a pass has run behind a partly compacted sequence"


@pytest.mark.slow
@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_identity_on_runner_v2(tiny_model, long_answers, force_async):
    # A source that samples nothing: vLLM's kernel for top-k does not run in Triton's interpreter.
    asks, expected = long_answers
    result = driver.run_case(
        {
            "model": str(tiny_model),
            "asks": [asdict(a) for a in asks[:3]],
            "kv_compaction": {**IDENTITY, **SOURCES["repeat"]},
            "v2": True,
            "force_async": force_async,
        }
    )
    assert result["compactions"] >= 3 and not result["failures"]
    assert result["reference_tokens"] > 0
    assert result["outputs"] == {k: v for k, v in expected.items() if int(k) < 3}


def test_queries_are_those_of_the_text_behind_the_context(tiny_model):
    """What a repeat pass leaves in the pool equals what the same tokens leave in one prompt."""
    prompt = random_prompt(random.Random(3), 200)
    instruction = [21, 22, 23]
    end = (200 - 16) // BLOCK * BLOCK
    repeated = prompt[BLOCK:end]  # behind one block of protected prefix
    kept: dict[str, list[torch.Tensor]] = {}

    def collect(engine, name):
        issue = engine.scheduler.compaction.jobs.slices

        def spy():
            for fit in issue():
                pool = engine.worker._compaction.queries.values()
                kept.setdefault(name, [layer[fit.query_slots].clone() for layer in pool])
                yield fit

        engine.scheduler.compaction.jobs.slices = spy

    exact = {**IDENTITY, "query_pool_share": 1.0}
    passes = {"queries": "repeat-prefill", "reference_prompts": {"repeat-prefill": [instruction]}}
    with driver.start(tiny_model, {**exact, **passes}) as engine:
        collect(engine, "pass")
        engine.run([Ask(prompt, 20)])
    whole = (*prompt[:end], *instruction, *repeated)
    with driver.start(tiny_model, {**exact, "cache": "off"}) as engine:
        collect(engine, "prompt")
        engine.run([Ask(whole, 4)])
    wanted = len(instruction) + len(repeated)
    for of_pass, of_prompt in zip(kept["pass"], kept["prompt"], strict=True):
        assert len(of_pass) == wanted
        # The prompt's own samples start at the span; the last of them are the repetition's.
        tail = of_prompt[end - BLOCK : end - BLOCK + wanted]
        torch.testing.assert_close(of_pass, tail, rtol=1e-3, atol=1e-3)


def test_mixture_keeps_its_fractions_and_the_cap(tiny_model):
    """256 query vectors at a group of 4 are 64 positions: half and half."""
    options = {
        **IDENTITY,
        "reference_queries": 256,
        "queries": {"repeat-prefill": 0.5, "context-prefill": 0.5},
    }
    with driver.start(tiny_model, options) as engine:
        found = []
        queries = engine.scheduler.compaction.queries
        choose = queries.choose

        def spy(span, *args, **kwargs):
            chosen = choose(span, *args, **kwargs)
            slots = set(chosen.slots.tolist())
            context = slots & set(queries._context(span).tolist())
            found.append((len(slots), len(context)))
            return chosen

        queries.choose = spy
        engine.run([Ask(random_prompt(random.Random(1), 400), 12)])
        assert engine.totals.compactions == 1
    positions, context = found[0]
    assert context == 32
    assert 48 <= positions <= 64, "the pass is sampled at a rate: about 32, never more"


def test_slices_of_one_fit_read_the_same_queries(tiny_model):
    """The sequence decodes on between them, others fill the query pool, and nothing changes."""
    options = {
        "ratio": 0.25,
        "threshold": 256,
        "step_ms": 0.001,
        "reference_queries": 512,
        "query_pool_share": 0,
    }
    # One after the other: what is read while one is fitted has no room for queries of its own.
    asks = [Ask(random_prompt(random.Random(i), 400), 80, arrives=45 * i) for i in range(4)]
    others = [Ask(random_prompt(random.Random(i), 200), 4, arrives=15 * i) for i in range(10)]
    with driver.start(tiny_model, options) as engine:
        fits = _watch_fits(engine)
        engine.run([*asks, *others])
        assert engine.totals.compactions >= 4 and not engine.totals.failures
        pool = engine.scheduler.compaction.query_pool
        assert pool.capacity == 2 * (128 + 64), "of two sequences with their prompts' ends"
    slots = {}
    for request_id, start, _, found, _ in fits:
        slots.setdefault((request_id, start), []).append(found.tolist())
    assert len({request_id for request_id, _ in slots}) == 4
    assert all(len(each) > 1 and each.count(each[0]) == len(each) for each in slots.values())


@pytest.mark.parametrize("kind", ["finish", "abort", "preempt"])
def test_passes_end_with_their_parent(tiny_model, kind):
    """Mid-study the parent goes: its passes, their blocks and their queries go with it."""
    options = {**IDENTITY, **SOURCES["self-study"], "self_study_tokens": 200}
    long = kind != "finish"
    asks = [
        Ask(random_prompt(random.Random(i), 300), 60 if long else 8, aborted=9 if i else None)
        for i in range(2 if kind == "abort" else 1)
    ]
    seen = 0
    with driver.start(tiny_model, options) as engine:

        def watch(engine, step):
            nonlocal seen
            seen = max(seen, len(engine.scheduler.passes))
            if step == 6:
                assert len(engine.scheduler.passes) == 2 * len(asks)
                if kind == "preempt":
                    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
                    assert not engine.scheduler.passes and not engine.scheduler.studies
                    assert engine.used_blocks == 0

        engine.before_step = watch
        outputs = engine.run(asks)
        assert len(outputs["0"]) == asks[0].max_tokens
        assert engine.used_blocks == 0
        scheduler = engine.scheduler
        assert not scheduler.passes and not scheduler.studies and not scheduler.requests
        assert not scheduler.compaction.query_pool.named_owners()
    assert seen == 2 * len(asks)


def test_users_come_first(tiny_model):
    """All slots are taken by passes: a user who arrives gets one in the next step, and the
    compaction goes on with the queries there are."""
    options = {**IDENTITY, **SOURCES["self-study"], "self_study_tokens": 100}
    asks = [
        Ask(random_prompt(random.Random(0), 300), 60),
        *(Ask(random_prompt(random.Random(i), 20), 30, arrives=10) for i in (1, 2)),
    ]
    admitted = {}

    def watch(engine, step):
        running = [r.request_id for r in engine.scheduler.running]
        if step == 10:
            assert len(running) == len(engine.scheduler.passes) + 1 == 3
        users = {i for i in running if i not in engine.scheduler.passes}
        for user in users:
            admitted.setdefault(user.partition("-")[0], step)

    with driver.start(tiny_model) as engine:
        expected = engine.run(asks)
    with driver.start(tiny_model, options, max_num_seqs=3) as engine:
        engine.before_step = watch
        assert engine.run(asks) == expected
        assert engine.totals.compactions >= 1
        assert engine.totals.reference_shortfalls >= 1
    assert admitted["1"] == 11 and admitted["2"] == 12, "one pass makes way in each step"


@pytest.mark.parametrize("limit", ["positions", "blocks"])
def test_without_room_for_passes_the_prompt_has_the_queries(tiny_model, limit):
    room = (
        {"max_model_len": 480}  # the span ends at 448, the pass needs 416 tokens behind it
        if limit == "positions"
        else {"num_gpu_blocks_override": 18, "max_model_len": 512}
    )
    options = {
        "ratio": 0.25,
        "threshold": 256,
        "recent_tokens": 16,
        "queries": "repeat-prefill",
        "reference_prompts": {"repeat-prefill": [[5] * 20]},
    }
    with driver.start(tiny_model, options, **room) as engine:
        fits = _watch_fits(engine)
        engine.run([Ask(random_prompt(random.Random(2), 470), 9)])
        assert engine.totals.compactions == engine.totals.reference_shortfalls == 1
        assert engine.totals.reference_tokens == 0
    assert all(len(slots) > 400 for *_, slots, _ in fits)


def test_passes_are_in_no_metric_but_their_own(tiny_model):
    """vLLM's running requests, and its prompt and output tokens, are those of users."""
    options = {**IDENTITY, **SOURCES["self-study"]}
    with driver.start(tiny_model, options, disable_log_stats=False) as engine:
        running, passes, reported = [], 0, 0
        make_stats = engine.scheduler.make_stats

        def spy(*args, **kwargs):
            nonlocal passes, reported
            stats = make_stats(*args, **kwargs)
            running.append(stats.num_running_reqs)
            passes = max(passes, len(engine.scheduler.passes))
            entry = (stats.kv_connector_stats or {}).get("kv_compaction", {})
            reported += entry.get("reference_tokens", 0)
            return stats

        engine.scheduler.make_stats = spy
        names = set()
        update = engine.scheduler.update_from_output

        def outputs_of(*args, **kwargs):
            result = update(*args, **kwargs)
            names.update(o.request_id for client in result.values() for o in client.outputs)
            return result

        engine.scheduler.update_from_output = outputs_of
        engine.run([Ask(random_prompt(random.Random(1), 300), 40)])
        assert engine.totals.reference_tokens == reported
    assert passes == 2 and max(running) == 1 and len(names) == 1
    assert reported == 2 + 11 + 1 + 11, "both starters and what was written, save the last tokens"


@pytest.mark.slow
@pytest.mark.parametrize("on_policy", [False, True], ids=["before", "on-policy"])
@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_accounting_under_fuzz(tiny_model, force_async, on_policy):
    """120 random requests with aborts in a small pool: every step, every block's reference count
    equals its owners, passes among them; passes run, make way, and are thrown out."""
    rng = random.Random(11)
    prefixes = [random_prompt(rng, 300) for _ in range(3)]
    asks = []
    for index in range(120):
        shared = rng.choice(prefixes)[: rng.choice([0, 0, 64, 150, 300])]
        arrives = 4 * index
        asks.append(
            Ask(
                shared + random_prompt(rng, rng.randrange(5, 260)),
                rng.randrange(4, 48),
                rng.choice([None, None, None, {"kv_compaction": "off"}]),
                arrives=arrives,
                aborted=arrives + rng.randrange(1, 40) if rng.random() < 0.15 else None,
            )
        )
    options = {
        "ratio": 0.2,
        "threshold": 128,
        "recent_tokens": 16,
        "min_span_tokens": 32,
        "pass_tokens": 64,
        "queries": {"repeat-prefill": 0.5, "self-study": 0.5},
        "starters": ["w5 w6"],
        "self_study_tokens": 24,
        "on_policy": on_policy,
    }
    with driver.start(
        tiny_model,
        options,
        force_async=force_async,
        num_gpu_blocks_override=113,
        max_model_len=768,
        max_num_batched_tokens=256,
        max_num_seqs=8,
    ) as engine:
        scheduler = engine.scheduler
        events: Counter[str] = Counter()

        def count(name):
            original = getattr(scheduler, name)

            def spy(*args, **kwargs):
                events[name] += 1
                return original(*args, **kwargs)

            setattr(scheduler, name, spy)

        count("_start_pass")
        count("_end_pass")
        fits: list[bool] = []
        begin_step = engine.worker._compaction.begin_step

        def spy(step, gone):
            fits.extend(fit.on_policy is not None for fit in (step.fits if step else ()))
            return begin_step(step, gone)

        engine.worker._compaction.begin_step = spy
        outputs = engine.run(asks)
        totals = engine.totals
        assert totals.compactions > 15 and not totals.failures
        assert 0 < totals.reference_shortfalls < totals.compactions
        assert events["_start_pass"] > 25 and events["_end_pass"] > 0
        assert fits.count(True) > 5 if on_policy else not any(fits)
        assert not all(fits), "some find no room for it"
        assert engine.used_blocks == 0
        assert not scheduler.passes and not scheduler.studies and not scheduler.requests
        assert not scheduler.compaction.query_pool.named_owners()
        assert not engine.worker._compaction.sequences
        scheduler.check_compaction()
    finished = {i for i, a in enumerate(asks) if a.aborted is None}
    assert all(len(outputs[str(i)]) == asks[i].max_tokens for i in finished)
