"""Acceptance 3 to 6 and the museum rows about memory: real freeing, bystanders, long contexts."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from tests.engine import driver
from tests.engine.driver import BLOCK, Ask, random_prompt
from vllm_am.engine.limits import PROMPT_TAIL_POSITIONS

pytestmark = [pytest.mark.engine]

#: No upper limit on sampled queries but the tokens themselves: fits repeat exactly.
EXACT_SAMPLING = {"query_pool_share": 1.0}
QUARTER = {"ratio": 0.25, "threshold": 160, "recent_tokens": 16, **EXACT_SAMPLING}
#: Nothing compacted is shared.
OWN_QUARTER = {**QUARTER, "cache": "off"}
OFF = {"kv_compaction": "off"}


def _blocks(tokens: float) -> int:
    return math.ceil(tokens / BLOCK)


def test_museum_1_blocks_are_really_freed_in_the_same_step(tiny_model):
    """T tokens at ratio r hold ceil(r T / block) blocks; the rest is free the moment it commits."""
    prompt = random_prompt(random.Random(0), 1000)
    recent = 64
    seen = []

    def watch(engine, step):
        seen.append((engine.used_blocks, engine.totals.compactions))

    options = {"ratio": 0.1, "threshold": 512, "recent_tokens": recent}
    with driver.start(tiny_model, options) as engine:
        engine.before_step = watch
        engine.run([Ask(prompt, 8)])
        assert engine.totals.compactions == 1
        assert engine.used_blocks == 0

    span = (1000 - recent) // BLOCK * BLOCK - BLOCK  # one block of protected prefix
    slots = _blocks(span / 10) * BLOCK  # whole blocks
    before = _blocks(1001)
    assert engine.totals.tokens == span
    assert engine.totals.slots == slots
    assert engine.totals.blocks_freed == span // BLOCK - _blocks(slots)
    uncompacted = [used for used, done in seen if used and not done]
    compacted = [used for used, done in seen if used and done]
    assert uncompacted[0] == before
    assert max(uncompacted) == before + _blocks(slots), "the target, while it is fitted"
    assert set(compacted) == {before - span // BLOCK + _blocks(slots)}


@pytest.mark.slow
def test_museum_2_3_bystanders_and_concurrency(tiny_model):
    """112 requests at once: those that are off equal stock, the others equal themselves alone."""
    rng = random.Random(3)
    prefix = random_prompt(rng, 96)
    asks = [
        Ask(
            (prefix if i % 3 == 0 else ()) + random_prompt(rng, rng.randrange(190, 420)),
            rng.randrange(6, 18),
            OFF if i % 2 else None,
            arrives=i // 16,
        )
        for i in range(112)
    ]
    options = {"num_gpu_blocks_override": 2049, "max_num_seqs": 112, "enable_prefix_caching": False}
    with driver.start(tiny_model, **options) as engine:
        stock = engine.run(asks)
    with driver.start(tiny_model, QUARTER, **options) as engine:
        together = engine.run(asks)
        assert engine.totals.compactions == 56
    alone = {}
    with driver.start(tiny_model, QUARTER, **options) as engine:
        for index, ask in enumerate(asks):
            if ask.extra_args is None:
                one = Ask(ask.prompt, ask.max_tokens)
                alone[str(index)] = engine.run([one], names=f"{index}/")[f"{index}/0"]
    off = {k for k in together if int(k) % 2}
    assert {k: together[k] for k in off} == {k: stock[k] for k in off}
    assert {k: together[k] for k in alone} == alone
    changed = sum(together[k] != stock[k] for k in alone)
    assert changed > 28, "compaction to a quarter must show on a random model"


def test_museum_2_shared_prefix_is_never_rewritten(tiny_model):
    """Two requests with a common prefix: one compacts it, the other, still on it, is stock's."""
    rng = random.Random(5)
    prefix = random_prompt(rng, 512)
    first = Ask(prefix + random_prompt(rng, 40), 24)
    # Arrives while the first one compacts, hits its exact blocks, and outlives it.
    second = Ask(prefix + random_prompt(rng, 50), 40, OFF, arrives=2)
    third = Ask(prefix + random_prompt(rng, 60), 8, OFF, arrives=30)
    with driver.start(tiny_model) as engine:
        stock = engine.run([first, second, third])
    with driver.start(tiny_model, QUARTER) as engine:
        outputs = engine.run([first, second, third])
        assert engine.totals.compactions == 1
        assert engine.cached_tokens["1"] == engine.cached_tokens["2"] == 512
    assert outputs["1"] == stock["1"]
    assert outputs["2"] == stock["2"]
    assert outputs["0"] != stock["0"]


def test_prefix_hit_brings_the_queries_along(tiny_model):
    """A prompt whose prefix is cached computes none of its queries, and is compacted all the same,
    with the queries that the first request left with the blocks."""
    rng = random.Random(6)
    prefix = random_prompt(rng, 640)
    asks = [Ask(prefix + random_prompt(rng, 20), 8, arrives=60 * i) for i in range(2)]
    sampled = []

    with driver.start(tiny_model, OWN_QUARTER) as engine:
        queries = engine.scheduler.compaction.queries
        choose = queries.choose

        def spy(*args, **kwargs):
            chosen = choose(*args, **kwargs)
            sampled.append(len(chosen.slots))
            return chosen

        queries.choose = spy
        engine.run(asks)
        assert engine.totals.compactions == 2
        assert engine.cached_tokens["1"] == 640
        # 20 own tokens, but queries of the whole span.
        assert sampled[1] == sampled[0]
        assert engine.totals.output_errors[1] == pytest.approx(engine.totals.output_errors[0], 0.2)


def test_a_prefix_without_its_queries_is_computed_again(tiny_model):
    """A fit without queries would lose nearly everything: only who stays exact begins on it."""
    rng = random.Random(7)
    prefix = random_prompt(rng, 640)
    asks = [Ask(prefix + random_prompt(rng, 20), 8, extra) for extra in (OFF, None, OFF)]
    with driver.start(tiny_model, OWN_QUARTER) as engine:
        engine.run(asks[:1], names="first-")
        engine.scheduler.compaction.query_pool.forget(range(engine.pool.num_gpu_blocks))
        engine.run(asks[2:], names="exact-")
        engine.scheduler.compaction.query_pool.forget(range(engine.pool.num_gpu_blocks))
        engine.run(asks[1:2], names="compacted-")
        assert engine.cached_tokens["exact-0"] == 640
        assert engine.cached_tokens["compacted-0"] == 0
        assert engine.totals.compactions == 1 and not engine.totals.failures


@pytest.mark.parametrize("copies", [2, 4], ids=["prefix-hit", "n=4"])
def test_block_counts_with_a_shared_prefix(tiny_model, copies):
    """Sequences on one cached prefix: its exact blocks are counted once while anyone holds them,
    each compacted part belongs to one sequence, and every count is as computed."""
    rng = random.Random(12)
    prefix = random_prompt(rng, 640)
    own = [() if copies == 4 else random_prompt(rng, 30 + i) for i in range(copies)]
    # The first one computes the prefix, the others hit it two steps later.
    asks = [Ask(prefix + own[i], 30, arrives=2 * min(i, 1)) for i in range(copies)]
    span = (640 - 16) // BLOCK * BLOCK - BLOCK if copies == 4 else 640 - BLOCK
    target = _blocks(span // 4)
    mixed_counts = set()

    def expected(engine):
        """Blocks in use, from token counts alone."""
        exact_prefix, private = 0, 0
        for request in engine.scheduler.requests.values():
            held = _blocks(request.num_computed_tokens)
            if not held:
                continue
            segments = engine.scheduler.compaction.blocks.segments(request.request_id)
            fitting = request.request_id in engine.scheduler.compaction.jobs.running
            shared = (span + BLOCK) // BLOCK  # blocks of the prefix that full hits share
            exact_prefix = max(exact_prefix, 1 if segments else shared)
            private += held - shared + target * (bool(segments) + fitting)
        return exact_prefix + private

    def watch(engine, step):
        assert engine.used_blocks == expected(engine)
        mixed_counts.add((len(engine.scheduler.running), engine.totals.compactions))

    with driver.start(tiny_model, OWN_QUARTER) as engine:
        engine.before_step = watch
        engine.run(asks)
        assert engine.totals.compactions == copies
        assert engine.totals.tokens == copies * span
        assert engine.used_blocks == 0
    assert {(copies, 1), (copies, copies)} <= mixed_counts, "some compacted beside others not"


def test_museum_16_same_prompt_many_times(tiny_model):
    """Museum row 16 (n > 1): every sample of a prompt compacts and finishes, and none leaks."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": list(random_prompt(random.Random(8), 600))}
    with driver.start(tiny_model, OWN_QUARTER) as engine:
        params = SamplingParams(
            n=4, temperature=1.0, seed=1, max_tokens=12, ignore_eos=True, detokenize=False
        )
        (output,) = engine.llm.generate([prompt], params, use_tqdm=False)
        assert [len(o.token_ids) for o in output.outputs] == [12] * 4
        assert engine.totals.compactions == 4
        ratio = SamplingParams(
            n=3,
            temperature=1.0,
            max_tokens=6,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_compaction_ratio": "2x"},
        )
        slots = engine.totals.slots
        engine.llm.generate([prompt], ratio, use_tqdm=False)
        assert engine.totals.compactions == 7
        span = engine.totals.tokens // 7
        assert engine.totals.slots - slots == 3 * _blocks(span / 2) * BLOCK
        engine.scheduler.check_compaction()
        assert engine.used_blocks == 0


def test_museum_20_prompt_four_times_the_pool(tiny_model):
    """Stock refuses to start; with compaction an 8,300-token prompt runs in 2,048 slots."""
    prompts = [Ask(random_prompt(random.Random(i), n), 12) for i, n in enumerate((8300, 5000, 200))]
    small = {
        "num_gpu_blocks_override": 65,
        "max_model_len": 9000,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
    }
    with pytest.raises(Exception, match=r"KV cache|Engine core"), driver.start(tiny_model, **small):
        pass
    peak = 0

    def watch(engine, step):
        nonlocal peak
        peak = max(peak, engine.used_blocks)

    with driver.start(tiny_model, {"ratio": 0.05, "threshold": 448}, **small) as engine:
        engine.before_step = watch
        outputs = engine.run(prompts)
        assert {k: len(v) for k, v in outputs.items()} == {"0": 12, "1": 12, "2": 12}
        assert engine.totals.compactions >= 12 and not engine.totals.failures
        assert engine.used_blocks == 0
    assert peak <= 64


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_cached_prefix_nearly_as_long_as_the_pool(tiny_model, force_async):
    """A conversation that outgrows the pool: its cached prefix leaves no room for its next chunk.

    Taken whole, it would wait for ever, and everybody behind it.
    """
    prompt = random_prompt(random.Random(5), 2300)
    small = {"num_gpu_blocks_override": 78, "max_model_len": 3000, "max_num_batched_tokens": 320}
    options = {"ratio": 0.1, "threshold": 320, "recent_tokens": 16}
    seen = 0

    def watch(engine, step):
        nonlocal seen
        seen = max(seen, engine.used_blocks)
        assert step < 500, "it waits for ever"

    with driver.start(tiny_model, options, force_async, **small) as engine:
        engine.before_step = watch
        engine.run([Ask(prompt[:2200], 2)], names="first-")
        assert seen >= 2200 // BLOCK, "uncompacted until its prefill is complete"
        asks = [Ask(prompt + random_prompt(random.Random(6), 500), 8), Ask(prompt[:2250], 8)]
        engine.run([*asks, Ask(random_prompt(random.Random(7), 100), 8, arrives=2)], names="next-")
        assert {len(engine.outputs[f"next-{i}"]) for i in range(3)} == {8}
        hit = engine.cached_tokens["next-0"]
        assert 1500 < hit < 2200 // BLOCK * BLOCK, "cut short, not given up"
        assert hit % BLOCK == 0 and not engine.totals.failures
        assert engine.used_blocks == 0


@pytest.mark.slow
def test_generation_outgrows_the_pool(tiny_model):
    """1,600 generated tokens in a pool of 992 slots."""
    with driver.start(
        tiny_model,
        {"ratio": 0.05, "threshold": 320, "recent_tokens": 32},
        num_gpu_blocks_override=32,
        max_model_len=1800,
        max_num_batched_tokens=128,
    ) as engine:
        outputs = engine.run([Ask(random_prompt(random.Random(1), 100), 1600)])
        assert len(outputs["0"]) == 1600
        assert engine.totals.compactions >= 4
        assert engine.totals.tokens > 1200
        assert engine.used_blocks == 0


def test_museum_5_long_prompt_in_small_chunks(tiny_model):
    """Fires during chunked prefill only for computed tokens, each token once."""
    spans = []
    prompt = random_prompt(random.Random(2), 3000)
    with driver.start(
        tiny_model,
        {"ratio": 0.1, "threshold": 320},
        num_gpu_blocks_override=49,
        max_model_len=3200,
        max_num_batched_tokens=96,
    ) as engine:
        manager = engine.scheduler.compaction.blocks
        commit = manager.commit

        def spy(job_id, request_id, segment, hashes):
            computed = engine.scheduler.requests[request_id].num_computed_tokens
            spans.append((segment.start, segment.end, computed))
            return commit(job_id, request_id, segment, hashes)

        manager.commit = spy
        engine.run([Ask(prompt, 4)])
    assert len(spans) >= 5
    assert spans[0][0] == BLOCK, "after the protected prefix"
    assert all(end <= computed - 64 for _, end, computed in spans)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_prompt_that_fits_waits_for_its_question(tiny_model):
    """With room for the whole prompt, nothing is compacted before its last token is computed."""
    with driver.start(
        tiny_model, {"ratio": 0.1, "threshold": 256}, max_num_batched_tokens=128
    ) as engine:
        progress = []

        def watch(engine, step):
            for request in engine.scheduler.running:
                job = engine.scheduler.compaction.jobs.running.get(request.request_id)
                progress.append((request.num_computed_tokens, job is not None))

        engine.before_step = watch
        engine.run([Ask(random_prompt(random.Random(4), 1500), 6)])
        assert engine.totals.compactions == 1
    assert any(computed > 600 for computed, _ in progress)
    assert all(computed >= 1500 for computed, fitting in progress if fitting)


@pytest.mark.parametrize("kind", ["finish", "abort", "preempt"])
def test_museum_4_state_ends_with_the_request(tiny_model, kind):
    """Block counts after finish, abort and preemption of compacted requests are as computed."""
    prompts = [random_prompt(random.Random(i), 420) for i in range(4)]
    asks = [Ask(p, 40, aborted=8 if kind == "abort" else None) for p in prompts]
    preempted = 0
    with driver.start(tiny_model, QUARTER) as engine:
        expected = engine.run(asks)
    with driver.start(tiny_model, QUARTER) as engine:
        if kind == "preempt":

            def preempt(engine, step):
                nonlocal preempted
                if step == 10:
                    assert len(engine.scheduler.compaction.blocks.compacted) == 4
                    # vLLM's own way to throw every running request out, and resume it.
                    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
                    assert not engine.scheduler.compaction.blocks.compacted
                    assert engine.used_blocks == 0
                    preempted = engine.totals.compactions

            engine.before_step = preempt
        outputs = engine.run(asks)
        assert engine.used_blocks == 0
        assert not engine.scheduler.compaction.blocks.compacted
        assert not engine.worker._compaction.sequences
        if kind == "preempt":
            # Compacted again as they came back; nothing negative, nothing lost.
            assert preempted == 4 and engine.totals.compactions == 8
    if kind == "finish":
        assert outputs == expected
    elif kind == "preempt":
        assert {k: len(v) for k, v in outputs.items()} == {k: 40 for k in expected}
        # What came before the preemption stands.
        assert all(outputs[k][:8] == expected[k][:8] for k in expected)


@pytest.mark.parametrize("ratio", ["engine", "request"])
def test_a_ratio_of_one_does_no_work(tiny_model, mixed, ratio):
    """Nothing is fitted, and the tokens are stock's. (Queries are kept as of every request: later
    ones may begin with its blocks, at another ratio.)"""
    asks, expected = mixed
    options = {"ratio": 1.0 if ratio == "engine" else 0.1, "threshold": 128, "recent_tokens": 16}
    if ratio == "request":
        asks = [replace(ask, extra_args={"kv_compaction_ratio": "1x"}) for ask in asks]
    with driver.start(tiny_model, options, at_ratio_one=False) as engine:
        assert engine.run(asks) == expected
        assert engine.totals.compactions == 0
        assert not engine.totals.reference_tokens


def test_preempted_in_identity_mode_equals_stock(tiny_model):
    """Acceptance 6, exactly: preempted when compacted, resumed, the same tokens as stock."""
    asks = [Ask(random_prompt(random.Random(i), 200), 130) for i in range(8)]
    with driver.start(tiny_model) as engine:
        expected = engine.run(asks)
    identity = {"ratio": 1.0, "threshold": 128, "recent_tokens": 16, **EXACT_SAMPLING}
    preemptions = 0
    with driver.start(
        tiny_model, identity, num_gpu_blocks_override=62, max_model_len=512
    ) as engine:
        original = engine.scheduler._preempt_request

        def spy(request, *args, **kwargs):
            nonlocal preemptions
            preemptions += request.request_id in engine.scheduler.compaction.blocks.compacted
            return original(request, *args, **kwargs)

        engine.scheduler._preempt_request = spy
        assert engine.run(asks) == expected
    assert preemptions > 0, "the pool must be small enough to preempt a compacted request"


def test_pool_share_compacts_instead_of_preempting(tiny_model):
    """With a share of the pool as threshold: nothing while there is room, then the longest first,
    and no preemption where stock vLLM preempts."""
    asks = [Ask(random_prompt(random.Random(i), 200 + 90 * i), 100) for i in range(6)]

    def serve(options, pool):
        preemptions = 0
        with driver.start(
            tiny_model, options, num_gpu_blocks_override=pool, max_model_len=1024
        ) as engine:
            original = engine.scheduler._preempt_request

            def spy(*args, **kwargs):
                nonlocal preemptions
                preemptions += 1
                return original(*args, **kwargs)

            engine.scheduler._preempt_request = spy
            engine.run(asks)
            return preemptions, getattr(engine.scheduler, "compaction", None)

    options = {"ratio": 0.1, "threshold": "70%", "recent_tokens": 32, "min_span_tokens": 96}
    options |= EXACT_SAMPLING
    assert serve(None, 97)[0] > 0
    preemptions, compaction = serve(options, 97)
    assert preemptions == 0
    assert compaction.journal.totals.compactions > 0
    assert serve(options, 513)[1].journal.totals.compactions == 0


@pytest.mark.slow
@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_accounting_under_fuzz(tiny_model, force_async):
    """Acceptance 4: 500 random requests with aborts in a tiny pool; every step, every block's
    reference count equals its owners; at the end nothing is held."""
    rng = random.Random(11)
    prefixes = [random_prompt(rng, 300) for _ in range(3)]
    asks = []
    for index in range(500):
        shared = rng.choice(prefixes)[: rng.choice([0, 0, 64, 150, 300])]
        asks.append(
            Ask(
                shared + random_prompt(rng, rng.randrange(5, 260)),
                rng.randrange(1, 24),
                rng.choice([None, None, None, OFF, {"kv_compaction_ratio": 0.5}]),
                arrives=index // 3,
                aborted=index // 3 + rng.randrange(1, 25) if rng.random() < 0.15 else None,
            )
        )
    options = {"ratio": 0.2, "threshold": 128, "recent_tokens": 16, "min_span_tokens": 32}
    options["query_pool_share"] = 0.5  # full now and then
    with driver.start(
        tiny_model,
        options,
        force_async=force_async,
        num_gpu_blocks_override=57,
        max_model_len=768,
        max_num_batched_tokens=256,
        max_num_seqs=12,
    ) as engine:
        outputs = engine.run(asks)
        assert engine.totals.compactions > 200
        assert engine.used_blocks == 0
        assert (
            not engine.worker._compaction.sequences
            and not engine.worker._compaction.fitting.running
        )
        assert (
            not engine.scheduler.compaction.jobs.running
            and not engine.scheduler.compaction.sequences.known
        )
        engine.scheduler.check_compaction()
    finished = {i for i, a in enumerate(asks) if a.aborted is None}
    assert all(len(outputs[str(i)]) == asks[i].max_tokens for i in finished)


def test_long_fit_is_spread_over_steps(tiny_model):
    """What it adds to a step is bounded: with no time at all a head is fitted in each, and the
    sequence goes on decoding on its exact KV meanwhile."""
    asks = [Ask(random_prompt(random.Random(9), 900), 40)]
    with driver.start(tiny_model, {**QUARTER, "step_ms": 0.001}) as engine:
        slices = []
        issue = engine.scheduler.compaction.jobs.slices

        def spy():
            found = list(issue())
            slices.extend((f.measures, f.heads.begin, f.heads.end, f.heads.of) for f in found)
            return iter(found)

        engine.scheduler.compaction.jobs.slices = spy
        sliced = engine.run(asks)["0"]
        # Two heads of three layers are measured for their budgets, then fitted.
        heads = [(head, head + 1, 6) for head in range(6)]
        assert slices == [(measures, *head) for measures in (True, False) for head in heads]
        assert engine.totals.compactions == 1
    with driver.start(tiny_model) as engine:
        stock = engine.run(asks)["0"]
    # First token from the prefill, then one more for each step until the commit.
    assert sliced[:13] == stock[:13] and sliced != stock


def test_whole_samples_or_none(tiny_model):
    """Prompts that are read in one step, more than the query pool has room for: those that come
    first are compacted with all their queries, the others stay exact, and are counted."""
    options = {"ratio": 0.25, "threshold": 256, "query_pool_share": 0, "reference_queries": 1024}
    asks = [Ask(random_prompt(random.Random(i), 400), 24) for i in range(8)]
    with driver.start(tiny_model) as engine:
        stock = engine.run(asks)
    with driver.start(tiny_model, options, max_num_batched_tokens=4096) as engine:
        pool, queries = engine.scheduler.compaction.query_pool, []
        start = engine.scheduler.compaction.jobs.start

        def spy(request, span, chosen, *args):
            queries.append((request.request_id.partition("-")[0], chosen.positions))
            return start(request, span, chosen, *args)

        engine.scheduler.compaction.jobs.start = spy
        outputs = engine.run(asks)
        assert pool.capacity == 2 * (256 + PROMPT_TAIL_POSITIONS), "of two"
        # 256 of 400 tokens: 64 % of the 320 that are compacted.
        assert list(dict(queries)) == ["0", "1"]
        assert all(positions > 0.9 * 0.64 * 320 for _, positions in queries)
        assert engine.totals.compactions == 2 and engine.totals.thin_spans == 6
        assert all(outputs[str(i)] == stock[str(i)] for i in range(2, 8))


def test_a_fit_without_any_queries_fails_alone(tiny_model, monkeypatch):
    """The sequence has to be compacted, and there is nothing to fit it to: it goes on."""
    from vllm_am.engine.scheduler.sequences import Sequences

    monkeypatch.setattr(Sequences, "must_be_compacted", lambda self, request: True)
    ask = Ask(random_prompt(random.Random(3), 600), 40)
    with driver.start(tiny_model) as engine:
        stock = engine.run([ask])
    with driver.start(tiny_model, OWN_QUARTER) as engine:
        engine.scheduler.compaction.queries.sample = lambda wanted: {}
        assert engine.run([ask]) == stock
        assert engine.totals.failures == {"no-queries": 1}


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_no_fit_for_a_request_that_ends_before_it(tiny_model, force_async):
    """One step fits, the next commits; one more where tokens are pending (async scheduling)."""
    compactions = {}
    with driver.start(tiny_model, {**QUARTER, "cache": "off"}, force_async=force_async) as engine:
        jobs = engine.scheduler.compaction.jobs
        for tokens in range(1, 7):
            before, first = engine.scheduler.compaction.journal.totals.compactions, jobs.next_id()
            engine.run([driver.Ask(driver.random_prompt(random.Random(tokens), 900), tokens)])
            begun = jobs.next_id() - first - 1
            compactions[tokens] = engine.scheduler.compaction.journal.totals.compactions - before
            assert begun == compactions[tokens], "nothing is begun that is not used"
        least = min(tokens for tokens, found in compactions.items() if found)
        assert engine.totals.short_requests == least - 1, "and who was left out is counted"
        engine.run([driver.Ask(driver.random_prompt(random.Random(7), 40), 1)])  # never so long
        assert engine.totals.short_requests == least - 1
    assert least <= (5 if force_async else 3)
    assert all(compactions[tokens] for tokens in range(least, 7))


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_a_burst_in_a_short_pool_is_read_as_queries_find_room(tiny_model, force_async):
    """Eight prompts at once, blocks for three of them and queries for one: they are compacted one
    after the other, from their whole samples, and none is preempted. Read at once, four would stay
    exact, and two be preempted. Where blocks suffice for all, they are read at once."""
    rng = random.Random(11)
    asks = [Ask(random_prompt(rng, 800), 100) for _ in range(8)]
    options = {"ratio": 0.1, "threshold": 500, "recent_tokens": 32, "query_pool_share": 0.5}
    begun = {}

    def watch(engine, step):
        begun[step] = sum(r.num_computed_tokens > 0 for r in engine.scheduler.running)

    for blocks, at_once in ((3 * _blocks(900) + 1, False), (9 * _blocks(900) + 1, True)):
        preempted = []
        with driver.start(
            tiny_model,
            options,
            force_async,
            num_gpu_blocks_override=blocks,
            max_model_len=1000,
            max_num_batched_tokens=8192,
        ) as engine:
            preempt = engine.scheduler._preempt_request

            def count(*args, preempt=preempt, seen=preempted, **named):
                seen.append(args)
                return preempt(*args, **named)

            engine.scheduler._preempt_request = count
            engine.before_step = watch
            engine.run(asks)
            assert (begun[3] == 8) == at_once
            if not at_once:
                assert engine.totals.compactions == 8 and engine.totals.thin_spans == 0
                assert not preempted
