"""Compact once, serve many: compacted prefixes that other sequences begin with."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.engine import driver
from tests.engine.driver import BLOCK, Ask, random_prompt

pytestmark = pytest.mark.engine

OFF = {"kv_compaction": "off"}
ALONE = {"kv_compaction_cache": "off"}
OPTIONS = {"ratio": 0.25, "threshold": 160, "recent_tokens": 64, "cache": "on"}
EXACT = {**OPTIONS, "ratio": 1.0}
#: What is left of a prompt behind the document stays exact.
ONE_SPAN = {**OPTIONS, "threshold": 320}
#: Of a document of 640 tokens, behind the protected block and but for its last block.
SPAN = 608 - BLOCK


def questions(rng: random.Random, count: int, every: int = 60) -> list[Ask]:
    """One document of 640 tokens, and a question of 40 to 63 behind it each time.

    Their spans end in the document: the last 64 tokens stay exact.
    """
    document = random_prompt(rng, 640)
    own = [random_prompt(rng, rng.randrange(40, 64)) for _ in range(count)]
    return [Ask((*document, *own[i]), 12, arrives=every * i) for i in range(count)]


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_a_later_question_costs_nothing(tiny_model, force_async):
    """One compaction for all; the others hold, compute and take nothing but their own tokens."""
    asks = questions(random.Random(0), 4)
    used = {}

    def watch(engine, step):
        for request in engine.scheduler.running:
            used[request.request_id.partition("-")[0]] = engine.used_blocks

    with driver.start(tiny_model, OPTIONS, force_async) as engine:
        engine.before_step = watch
        engine.run(asks)
        totals = engine.totals
        assert totals.compactions == 1
        assert totals.cache_queries == 4
        assert totals.cache_hits == 3
        assert totals.cache_hit_tokens == 3 * SPAN
        assert [engine.cached_tokens[str(i)] for i in range(4)] == [0, 640, 640, 640]
        own = -(-(32 + 63 + 12) // BLOCK) + 1
        for name in "123":
            assert used[name] <= 1 + SPAN // BLOCK // 4 + own
        assert engine.used_blocks == 0
        holdings = engine.scheduler.compaction.holdings()
        assert (holdings.cache_entries, holdings.cache_blocks_used) == (1, 0)
        assert holdings.cache_blocks_free == -(-SPAN // 4 // BLOCK)


def test_an_entry_that_keeps_everything_is_the_exact_text(tiny_model):
    """At ratio 1 sequences on a shared entry answer as stock vLLM does."""
    asks = questions(random.Random(1), 4)
    with driver.start(tiny_model) as engine:
        stock = engine.run(asks)
    with driver.start(tiny_model, EXACT) as engine:
        assert engine.run(asks) == stock
        assert engine.totals.compactions == 1
        assert engine.totals.cache_hits == 3


@pytest.mark.slow
def test_many_at_once_wait_for_one(tiny_model):
    """They come together: one is compacted, the others take its segment over."""
    asks = questions(random.Random(2), 8, every=0)
    with driver.start(tiny_model) as engine:
        stock = engine.run(asks)
    with driver.start(tiny_model, EXACT) as engine:
        assert engine.run(asks) == stock
        assert engine.totals.compactions == 1
        assert engine.totals.cache_adoptions == 7
    asks = questions(random.Random(2), 8, every=0)
    alone = [Ask(ask.prompt, ask.max_tokens, ALONE) for ask in asks]
    with driver.start(tiny_model, {**OPTIONS, "query_pool_share": 1.0}) as engine:
        engine.run(alone, names="alone-")
        assert engine.totals.compactions == 8
        engine.run(asks)
        assert engine.totals.compactions == 9
        assert engine.totals.cache_adoptions + engine.totals.cache_hits == 7


def long_questions(rng: random.Random, count: int, every: int) -> list[Ask]:
    """One document of 640 tokens, and a question of 130 to 200 behind it each time.

    The last 64 tokens stay exact: as they are, the spans would end in the questions.
    """
    document = random_prompt(rng, 640)
    own = [random_prompt(rng, rng.randrange(130, 200)) for _ in range(count)]
    return [Ask((*document, *own[i]), 12, arrives=every * i) for i in range(count)]


def test_a_marked_prefix_is_shared_from_the_first_on(tiny_model):
    """It ends there exactly, in whole blocks, however long or short the questions are."""
    rng = random.Random(10)
    document = random_prompt(rng, 640)
    marked = {"kv_compaction_prefix_tokens": 650}
    asks = [
        Ask((*document, *random_prompt(rng, own)), 12, marked, arrives=60 * i)
        for i, own in enumerate((130, 170, 50, 12))
    ]
    with driver.start(tiny_model, ONE_SPAN) as engine:
        engine.run(asks)
        (entry,) = engine.scheduler.compaction.blocks.cache.entries()
        assert (entry.segment.start, entry.segment.end) == (BLOCK, 640)
        assert engine.totals.compactions == 1
        assert engine.totals.cache_hits == 3


def test_a_common_prefix_is_found_by_the_second(tiny_model):
    """The first does not know of others; the second shares what both have; the others find it."""
    asks = long_questions(random.Random(11), 4, every=60)
    with driver.start(tiny_model, ONE_SPAN) as engine:
        engine.run(asks)
        spans = [e.segment for e in engine.scheduler.compaction.blocks.cache.entries()]
        assert sorted(s.end for s in spans) == [640, len(asks[0].prompt) // BLOCK * BLOCK - 64]
        assert engine.totals.compactions == 2
        assert engine.totals.cache_hits == 2


@pytest.mark.slow
def test_a_common_prefix_of_many_at_once_is_compacted_once(tiny_model):
    """They know of one another before the first of them is due."""
    rng = random.Random(12)
    asks = [*long_questions(rng, 4, every=0)]
    document = asks[0].prompt[:640]
    asks += [Ask((*document, *random_prompt(rng, n)), 12) for n in (9, 40, 64, 90)]
    with driver.start(tiny_model) as engine:
        stock = engine.run(asks)
    with driver.start(tiny_model, {**ONE_SPAN, "ratio": 1.0}) as engine:
        assert engine.run(asks) == stock
        assert engine.totals.compactions == 1
        assert engine.totals.cache_adoptions == 7
        (entry,) = engine.scheduler.compaction.blocks.cache.entries()
        assert entry.segment.end == 640


@pytest.mark.slow
def test_who_leads_may_go(tiny_model):
    """The sequence that all others wait for is aborted: its compaction goes on for them."""
    asks = questions(random.Random(3), 4, every=0)
    first = asks[0]

    def abort(engine, step):
        jobs = [name.partition("-")[0] for name in engine.scheduler.compaction.jobs.running]
        if "0" in jobs:
            assert jobs == ["0"]
            aborted.append(step)
            engine.llm.llm_engine.abort_request(["0"])

    aborted = []
    with driver.start(tiny_model, OPTIONS, max_num_batched_tokens=4096) as engine:
        engine.before_step = abort
        engine.run([Ask(first.prompt, 40), *asks[1:]])
        assert engine.totals.compactions == 1
        assert engine.totals.cache_adoptions == 3
        assert aborted
        assert {"1", "2", "3"} <= set(engine.outputs)


@pytest.mark.slow
def test_a_fit_that_fails_is_tried_for_the_next(tiny_model, monkeypatch):
    from vllm_am.engine.worker import fitting

    asks = questions(random.Random(4), 3, every=0)
    failed = []
    compact = fitting.compact

    def fail_once(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise fitting.FitError("singular", range(1))
        return compact(*args, **kwargs)

    monkeypatch.setattr(fitting, "compact", fail_once)
    with driver.start(tiny_model, OPTIONS) as engine:
        engine.run(asks)
        assert engine.totals.failures == {"singular": 1}
        assert engine.totals.compactions == 1
        assert engine.totals.cache_adoptions >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    ["token", "ratio", "salt", "cache-off", "off", "prompt-logprobs"],
)
def test_what_else_was_asked_for_misses(tiny_model, change):
    from vllm import SamplingParams

    rng = random.Random(5)
    ask = questions(rng, 1)[0]
    prompt = list(ask.prompt)
    prompt[100] += change == "token"
    extra = {
        "ratio": {"kv_compaction_ratio": 0.5},
        "cache-off": ALONE,
        "off": OFF,
    }.get(change)
    with driver.start(tiny_model, OPTIONS) as engine:
        engine.run([ask])
        params = SamplingParams(
            max_tokens=8,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
            prompt_logprobs=1 if change == "prompt-logprobs" else None,
        )
        salt = {"cache_salt": "another"} if change == "salt" else {}
        inputs = {"prompt_token_ids": prompt, **salt}
        engine.llm.generate([inputs], params, use_tqdm=False)
        assert engine.totals.cache_hits == 0
        assert engine.totals.compactions == 1 + (change != "off")
        engine.run([ask], names="again-")
        assert engine.totals.cache_hits == 1


def _bytes(engine, entry):
    """What an entry holds: the pages of its blocks and their bias."""
    kv = engine.worker._compaction.kv
    lists = engine.worker._compaction.published[entry.segment_id][1]
    pages = torch.cat([torch.as_tensor(ids) for ids in lists])
    return kv.pages[pages].clone(), kv.bias[pages].clone()


@pytest.mark.slow
def test_an_entry_carries_no_trace_of_a_question(tiny_model):
    """Whoever asks first, and whatever: the same bytes."""
    rng = random.Random(6)
    document = random_prompt(rng, 640)
    held = []
    for length in (40, 63):
        with driver.start(tiny_model, OPTIONS) as engine:
            engine.run([Ask((*document, *random_prompt(rng, length)), 4)])
            (entry,) = engine.scheduler.compaction.blocks.cache.entries()
            held.append(_bytes(engine, entry))
    for first, second in zip(*held, strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
def test_a_chat_stands_on_its_last_turn(tiny_model):
    """The next turn finds the segments of the last one, and what was computed behind them."""
    rng = random.Random(7)
    history, end = random_prompt(rng, 700), 0
    with driver.start(tiny_model, OPTIONS) as engine:
        for turn in range(4):
            engine.run([Ask(history, 150)], names=f"turn-{turn}-")
            # All but the last partial block and the token that nobody has computed.
            assert engine.cached_tokens[f"turn-{turn}-0"] >= end - BLOCK
            end = len(history) + 150
            history = (*history, *engine.outputs[f"turn-{turn}-0"], *random_prompt(rng, 40))
        chains = [
            len(list(engine.scheduler.compaction.blocks.cache.entries())),
            engine.totals.compactions,
        ]
        assert chains[0] == chains[1] >= 2


#: No time for fits: a head per step. Those of a request with a short answer outlast it.
SLOWLY = {**ONE_SPAN, "step_ms": 0.001}


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_a_compaction_that_others_want_outlasts_its_request(tiny_model, force_async):
    """Short answers to questions about one document: the second knows that there are others, and
    leaves the third a compacted one. The engine goes on by itself in between."""
    rng = random.Random(20)
    document = random_prompt(rng, 640)
    asks = [Ask((*document, *random_prompt(rng, 130 + 10 * i)), 3) for i in range(4)]
    with driver.start(tiny_model, SLOWLY, force_async) as engine:
        engine.run(asks[:1], names="first-")
        assert engine.totals.compactions == 0, "nobody gains by it"
        engine.run(asks[1:2], names="second-")
        jobs = engine.scheduler.compaction.jobs
        assert not jobs.running and len(jobs.detached) == 1
        assert engine.scheduler.has_requests() and engine.used_blocks > 0
        while engine.scheduler.has_requests():
            engine.llm.llm_engine.step()
            engine.scheduler.check_compaction()
        assert engine.totals.compactions == 1 and engine.used_blocks == 0
        engine.run(asks[2:], names="later-")
        assert engine.totals.cache_hits == 2 and engine.totals.compactions == 1
        assert not engine.worker._compaction.fitting.running
    with driver.start(tiny_model) as engine:
        stock = engine.run(asks)
    with driver.start(tiny_model, {**SLOWLY, "ratio": 1.0}) as engine:
        for i, ask in enumerate(asks):
            engine.run([ask], names=f"{i}-")
            while engine.scheduler.has_requests():
                engine.llm.llm_engine.step()
        assert [engine.outputs[f"{i}-0"] for i in range(4)] == [stock[str(i)] for i in range(4)]
        assert engine.totals.cache_hits == 2


@pytest.mark.parametrize("end", ["reset", "failure", "others-wait"])
def test_a_compaction_without_its_request_comes_to_an_end(tiny_model, monkeypatch, end):
    """Whatever happens, all blocks come back, and the worker forgets it."""
    from vllm_am.compaction import FitError
    from vllm_am.engine.worker import fitting

    rng = random.Random(21)
    document = random_prompt(rng, 640)
    asks = [Ask((*document, *random_prompt(rng, 130 + 10 * i)), 3) for i in range(3)]
    small = {"num_gpu_blocks_override": 41, "max_model_len": 1200} if end == "others-wait" else {}
    with driver.start(tiny_model, SLOWLY, **small) as engine:
        for i in range(2):
            engine.run(asks[i : i + 1], names=f"{i}-")
        jobs, state = engine.scheduler.compaction.jobs, engine.worker._compaction
        assert len(jobs.detached) == 1
        if end == "reset":
            assert engine.scheduler.reset_prefix_cache()
        elif end == "failure":

            def fails(*args, **kwargs):
                raise FitError("singular", heads=[0])

            monkeypatch.setattr(fitting, "compact", fails)
        else:  # a prompt that does not fit beside what is held
            engine.run([Ask(random_prompt(rng, 1000), 2, OFF)], names="other-")
            assert engine.totals.pressed_steps > 0
        while engine.scheduler.has_requests():
            engine.llm.llm_engine.step()
            engine.scheduler.check_compaction()
        assert engine.totals.failures == ({"singular": 1} if end == "failure" else {})
        assert engine.totals.compactions == (end == "others-wait")
        engine.run(asks[2:], names="last-")
        assert not jobs.all or end != "others-wait"
        while engine.scheduler.has_requests():
            engine.llm.llm_engine.step()
        assert engine.used_blocks == 0 and not state.fitting.running
        engine.scheduler.compaction.query_pool.check()


def test_a_reset_forgets_them(tiny_model):
    asks = questions(random.Random(8), 2)
    with driver.start(tiny_model, OPTIONS) as engine:
        engine.run(asks[:1])
        assert engine.scheduler.reset_prefix_cache()
        engine.run(asks[1:], names="after-")
        assert engine.totals.cache_hits == 0
        assert engine.totals.compactions == 2
        engine.scheduler.compaction.blocks.cache.sweep(now=True)
        assert len(list(engine.scheduler.compaction.blocks.cache.entries())) == 1


def test_an_entry_outlasts_exact_blocks_that_were_used_later(tiny_model, monkeypatch):
    """Unused, it stays while other blocks are free; where entries are many, while the pool is
    handed out several times over, and used, again so long."""
    from vllm_am.engine.scheduler import compact_cache

    rng = random.Random(20)
    first, later = questions(rng, 2)
    small = {"num_gpu_blocks_override": 65, "max_model_len": 1024}

    def others(engine, count, name):
        """Exact prompts of 20 blocks each, one after the other: three fill the pool."""
        asks = [Ask(random_prompt(rng, 640), 2, OFF, 4 * i) for i in range(count)]
        engine.run(asks, names=name)

    with driver.start(tiny_model, OPTIONS, **small) as engine:
        engine.run([first], names="first-")
        for turn in range(2):
            others(engine, 6, f"between-{turn}-")
            engine.run([later], names=f"later-{turn}-")
            assert engine.totals.compactions == 1
            assert engine.totals.cache_hits == turn + 1
        others(engine, 30, "long-")
        engine.run([later], names="kept-")
        assert engine.totals.compactions == 1
        monkeypatch.setattr(compact_cache, "KEPT_SHARE", 0)
        others(engine, 30, "longer-")
        engine.run([later], names="last-")
        assert engine.totals.compactions == 2, "it is not kept for ever"


def test_exact_blocks_of_a_compacted_text_go_first(tiny_model):
    """Nobody begins with them any more; what was used before is still there."""
    rng = random.Random(21)
    other = Ask(random_prompt(rng, 320), 2, OFF)
    with driver.start(
        tiny_model, OPTIONS, num_gpu_blocks_override=65, max_model_len=1024
    ) as engine:
        engine.run([other], names="other-")
        for ask in questions(rng, 3, every=0):
            engine.run([Ask((*random_prompt(rng, 320), *ask.prompt[320:]), 4)], names="new-")
        engine.run([other], names="again-")
        assert engine.totals.compactions == 3
        assert engine.cached_tokens["again-0"] >= 288


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "force_async"), [(65, False), (49, True)], ids=["sync", "async"]
)
def test_everything_at_once_adds_up(tiny_model, blocks, force_async):
    """Shared documents, aborts, other ratios, exact requests, a pool that evicts entries: every
    reference is accounted for in every step, and what is exact equals stock vLLM."""
    rng = random.Random(blocks)
    documents = [random_prompt(rng, rng.randrange(300, 480)) for _ in range(3)]
    asks = []
    for index in range(40):
        own = random_prompt(rng, rng.randrange(20, 60))
        extra = rng.choice([None, None, None, OFF, ALONE, {"kv_compaction_ratio": 0.5}])
        aborted = index // 2 + 8 if index % 7 == 3 else None
        asks.append(
            Ask((*rng.choice(documents), *own), rng.randrange(4, 30), extra, index // 2, aborted)
        )
    sizes = {"num_gpu_blocks_override": blocks, "max_model_len": 1024}
    exact = {str(i) for i, ask in enumerate(asks) if ask.extra_args == OFF and not ask.aborted}
    with driver.start(tiny_model, max_model_len=1024) as engine:
        stock = engine.run(asks)
    sums = {}

    def watch(engine, step):
        for entry in engine.scheduler.compaction.blocks.cache.entries():
            if entry.alive and entry.segment_id in engine.worker._compaction.published:
                pages, bias = _bytes(engine, entry)
                now = (float(pages.double().sum()), float(bias.double().nan_to_num().sum()))
                assert sums.setdefault(entry.segment_id, now) == now, "an entry was written to"

    with driver.start(tiny_model, OPTIONS, force_async, **sizes) as engine:
        engine.before_step = watch
        outputs = engine.run(asks)
        totals = engine.totals
        assert totals.cache_hits + totals.cache_adoptions > 3
        assert engine.used_blocks == 0
        assert {name: outputs[name] for name in exact} == {name: stock[name] for name in exact}
        assert engine.scheduler.reset_prefix_cache()
        engine.scheduler.compaction.blocks.cache.sweep(now=True)
        assert not list(engine.scheduler.compaction.blocks.cache.entries())
    assert sums


def make_adapter(model: Path, folder: Path, seed: int) -> Path:
    """A LoRA adapter that changes what the tiny model says."""
    config = json.loads((model / "config.json").read_text())
    width, rank = config["hidden_size"], 8
    heads = config["num_attention_heads"] * config["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(heads, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


@pytest.mark.slow
def test_adapters_are_kept_apart(tiny_model, tmp_path):
    """The same text under another adapter is another prefix; under the same one it is the same."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = [None] + [
        LoRARequest(f"a{i}", i, str(make_adapter(tiny_model, tmp_path / f"a{i}", i)))
        for i in (1, 2)
    ]
    asks = questions(random.Random(30), 2)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)

    def served(engine):
        return [
            engine.llm.generate(
                [{"prompt_token_ids": list(ask.prompt)}],
                params,
                lora_request=adapter,
                use_tqdm=False,
            )[0]
            .outputs[0]
            .token_ids
            for ask in asks
            for adapter in adapters
        ]

    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with driver.start(tiny_model, **options) as engine:
        stock = served(engine)
    assert len(set(map(tuple, stock[:3]))) == 3, "the adapters change nothing"
    with driver.start(tiny_model, EXACT, **options) as engine:
        assert served(engine) == stock
        assert engine.totals.compactions == 3
        assert engine.totals.cache_hits == 3
