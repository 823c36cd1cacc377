"""Prefixes with a name: pinned, dropped, saved to files, loaded from them by any engine."""

from __future__ import annotations

import random
from concurrent.futures import Future

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine import driver
from tests.engine.driver import BLOCK, Ask, random_prompt
from vllm_am.config import CompactionConfigError
from vllm_am.engine.prefix_file import PrefixFile

pytestmark = pytest.mark.engine

OPTIONS = {"ratio": 0.25, "threshold": 320, "recent_tokens": 64, "cache": "on"}
EXACT = {**OPTIONS, "ratio": 1.0}
#: Of the document, in whole blocks.
TOKENS = 640
OWN_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
MARKED = {"kv_compaction_prefix_tokens": TOKENS, "kv_compaction": "force"}


def document(seed: int) -> tuple[int, ...]:
    return random_prompt(random.Random(seed), TOKENS + 9)


def questions(text: tuple[int, ...], count: int, every: int = 40) -> list[Ask]:
    rng = random.Random(len(text))
    own = [random_prompt(rng, 20 + 9 * i) for i in range(count)]
    return [Ask((*text, *own[i]), 12, arrives=every * i) for i in range(count)]


def ask(engine, action, **arguments):
    """What the engine core answers; steps until it does."""
    answer = engine.core.kv_compaction_prefixes(action, arguments)
    for _ in range(100):
        if not isinstance(answer, Future) or answer.done():
            break
        engine.llm.llm_engine.step()
        engine.scheduler.check_compaction()
    return answer.result(60) if isinstance(answer, Future) else answer


def settle(engine):
    """Step until nothing is left to do."""
    while engine.scheduler.has_requests():
        engine.llm.llm_engine.step()
        engine.scheduler.check_compaction()


def compact(engine, text, name="contract", salt=None, ratio=None):
    """Have a document compacted, and pin it."""
    extra = {**MARKED, **({} if ratio is None else {"kv_compaction_ratio": ratio})}
    engine.run([Ask(text, 2, extra)], names=name)
    settle(engine)
    return ask(engine, "pin", name=name, token_ids=list(text), salt=salt, ratio=ratio, end=TOKENS)


def sequence_pages(engine):
    """By segment: all that the pages of its heads hold."""
    state = engine.worker._compaction
    return {
        number: [(state.kv.pages[ids].clone(), state.kv.bias[ids].clone()) for ids in lists]
        for number, (_, lists) in state.published.items()
    }


@pytest.fixture(scope="module")
def stock(tiny_model):
    asks = questions(document(0), 3)
    with driver.start(tiny_model) as engine:
        return asks, dict(engine.run(asks))


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A file in which everything is kept, and what was said of it."""
    path = tmp_path_factory.mktemp("saved") / "contract.kv"
    with driver.start(tiny_model, EXACT) as engine:
        pinned = compact(engine, document(0))
        assert pinned["tokens"] == TOKENS
        answer = ask(engine, "save", name="contract", path=str(path))
        assert answer["bytes"] == path.stat().st_size
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    return path


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_a_saved_prefix_is_the_exact_text(tiny_model, saved, stock, force_async):
    """Nothing of it is computed or compacted, and answers are those of stock vLLM."""
    asks, expected = stock
    options = {**EXACT, "preload": [str(saved)]}
    with driver.start(tiny_model, options, force_async) as engine:
        settle(engine)
        assert engine.totals.cache_loads == 1
        assert engine.run(asks) == expected
        assert engine.totals.compactions == 0
        assert engine.totals.cache_hits == 3
        assert [engine.cached_tokens[str(i)] for i in range(3)] == [TOKENS] * 3
        held = TOKENS // BLOCK
        assert engine.used_blocks == held
        assert engine.scheduler.compaction.holdings().cache_blocks_pinned == held
        assert ask(engine, "list")["prefixes"][0]["name"] == "contract"


def test_it_is_used_below_the_threshold(tiny_model, saved, stock):
    """Whoever names a prefix wants it used: by prompts that would never be compacted, too."""
    asks, expected = stock
    options = {**EXACT, "threshold": 1500, "preload": [str(saved)]}
    with driver.start(tiny_model, options) as engine:
        settle(engine)
        assert engine.run(asks) == expected
        assert engine.totals.cache_hits == 3
        ask(engine, "drop", name="contract")
        engine.run([Ask((*document(0), 7, 7), 4)], names="later-")
        assert engine.totals.cache_hits == 3


def test_what_is_loaded_is_what_was_saved(tiny_model, tmp_path):
    """To the bit: heads of different lengths, bias and all; and once more through a file."""
    path, again = tmp_path / "a.kv", tmp_path / "b.kv"
    options = {**OPTIONS, "reference_queries": 256}
    with driver.start(tiny_model, options) as engine:
        compact(engine, document(1))
        ask(engine, "save", name="contract", path=str(path))
        (before,) = sequence_pages(engine).values()
    with driver.start(tiny_model, options) as engine:
        loaded = ask(engine, "load", name="other", path=str(path))
        assert (loaded["name"], loaded["tokens"], loaded["ratio"]) == ("other", TOKENS, 0.25)
        (after,) = sequence_pages(engine).values()
        ask(engine, "save", name="other", path=str(again))
        engine.run(questions(document(1), 2))
        assert engine.totals.cache_hits == 2
    for (pages, bias), (loaded_pages, loaded_bias) in zip(before, after, strict=True):
        assert pages.shape == loaded_pages.shape
        used = ~bias.isneginf()
        assert torch.equal(bias[used], loaded_bias[~loaded_bias.isneginf()])
        assert torch.equal(pages[used], loaded_pages[~loaded_bias.isneginf()])
    one, two = load_file(path), load_file(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        {"options": {"tensor_parallel_size": 2}, "environment": OWN_CORES},
        {
            "options": {"pipeline_parallel_size": 2, "enforce_eager": False},
            "environment": OWN_CORES,
        },
        {"options": {"block_size": 64, "num_gpu_blocks_override": 257}},
        {"options": {"block_size": 16, "num_gpu_blocks_override": 1025}},
        {"v2": True, "force_async": True},
        {"environment": {"PYTHONHASHSEED": "7"}},
    ],
    ids=["tp2", "pp2", "blocks-64", "blocks-16", "v2-async", "hash-seed"],
)
def test_other_engines_load_it(tiny_model, tmp_path, stock, way):
    """Other ranks, other blocks, another runner, other hashes."""
    asks, expected = stock
    options = way.get("options", {})
    path = tmp_path / "contract.kv"
    # Where blocks are larger, a span has to begin and end where theirs do.
    protected = {"protected_tokens": 64} if options.get("block_size") == 64 else {}
    with driver.start(tiny_model, {**EXACT, **protected}) as engine:
        compact(engine, document(0))
        ask(engine, "save", name="contract", path=str(path))
    case = {
        "model": str(tiny_model),
        "kv_compaction": {**EXACT, "preload": [str(path)]},
        "asks": [
            {"prompt": list(a.prompt), "max_tokens": a.max_tokens, "arrives": 8 + a.arrives}
            for a in asks
        ],
        **way,
    }
    result = driver.run_case(case)
    assert result["outputs"] == expected
    assert result["compactions"] == 0
    assert result["shared"] == 3


@pytest.mark.slow
def test_uneven_heads_load_under_other_ranks(tiny_model, tmp_path):
    """Where one rank has the large heads, the blocks are as many as that rank needs."""
    path = tmp_path / "contract.kv"
    with driver.start(tiny_model, OPTIONS) as engine:
        heads = engine.worker._compaction.parts.heads
    shares = {head: 0.4 if head.endswith("H0") else 0.1 for head in heads}
    options = {**OPTIONS, "budgets": shares}
    with driver.start(tiny_model, options) as engine:
        compact(engine, document(2))
        ask(engine, "save", name="contract", path=str(path))
        engine.run(asks := questions(document(2), 2))
        expected = {name: engine.outputs[name] for name in ("0", "1")}
    case = {
        "model": str(tiny_model),
        "kv_compaction": {**options, "preload": [str(path)]},
        "options": {"tensor_parallel_size": 2},
        "environment": OWN_CORES,
        "asks": [{"prompt": list(a.prompt), "max_tokens": 12, "arrives": 60} for a in asks],
    }
    result = driver.run_case(case)
    assert (result["compactions"], result["shared"]) == (0, 2)
    assert result["outputs"] == expected


def test_a_name_holds_its_blocks(tiny_model):
    """Whatever else is served; and when it is dropped, they are as free as any others."""
    options = {**OPTIONS, "threshold": 160}
    with driver.start(tiny_model, options, num_gpu_blocks_override=97) as engine:
        compact(engine, document(3))
        before = sequence_pages(engine)
        rng = random.Random(3)
        engine.run([Ask(random_prompt(rng, 700), 40, arrives=2 * i) for i in range(12)])
        after = sequence_pages(engine)
        for number, pages in before.items():
            for (one, bias), (other, other_bias) in zip(pages, after[number], strict=True):
                assert torch.equal(one, other) and torch.equal(bias, other_bias)
        hits = engine.totals.cache_hits
        engine.run(questions(document(3), 1), names="again-")
        assert engine.totals.cache_hits == hits + 1
        held = engine.used_blocks
        assert held == 1 + -(-(TOKENS - BLOCK) // 4 // BLOCK)
        ask(engine, "drop", name="contract")
        assert engine.used_blocks == 0
        assert ask(engine, "drop", name="contract")["refused"] == "unknown"


def test_names_never_starve_requests(tiny_model):
    """They hold half of the pool at most, and leave room for the longest sequence."""
    options = {**OPTIONS, "threshold": 160, "ratio": 0.5}
    with driver.start(tiny_model, options, num_gpu_blocks_override=97) as engine:
        answers = [compact(engine, document(10 + i), f"name-{i}") for i in range(6)]
        refused = [answer for answer in answers if "refused" in answer]
        held = engine.scheduler.compaction.names.block_count
        assert refused and held <= 48
        assert {answer["refused"] for answer in refused} == {"no-room"}
        assert "pinned_share" in refused[0]["says"] or "--max-model-len" in refused[0]["says"]
        rng = random.Random(4)
        engine.run([Ask(random_prompt(rng, 1500), 100)], names="long-")
        assert len(engine.outputs["long-0"]) == 100


def test_names_may_hold_less(tiny_model):
    with driver.start(tiny_model, {**OPTIONS, "pinned_share": 0.01}) as engine:
        refused = compact(engine, document(3))
        assert refused["refused"] == "no-room" and "pinned_share" in refused["says"]
        assert engine.used_blocks == 0


def test_a_file_of_other_options(tiny_model, tmp_path):
    """Refused by the option's name, unless that is accepted: here, or by the engine's operator."""
    path = tmp_path / "contract.kv"
    with driver.start(tiny_model, OPTIONS) as engine:
        compact(engine, document(9))
        ask(engine, "save", name="contract", path=str(path))
    others = {**OPTIONS, "reference_queries": 512}
    with driver.start(tiny_model, others) as engine:
        refused = ask(engine, "load", name="x", path=str(path))
        assert refused["refused"] == "wrong" and "reference_queries=8192" in refused["says"]
        loaded = ask(engine, "load", name="x", path=str(path), any_options=True)
        assert loaded["tokens"] == TOKENS
    with (
        pytest.raises(CompactionConfigError, match=r"--kv-compaction-preload: .*options"),
        driver.start(tiny_model, {**others, "preload": [str(path)]}),
    ):
        pass
    others["load_any_options"] = True
    with driver.start(tiny_model, {**others, "preload": [str(path)]}) as engine:
        settle(engine)
        assert engine.totals.cache_loads == 1


def test_a_taken_name(tiny_model):
    with driver.start(tiny_model, OPTIONS) as engine:
        compact(engine, document(4))
        assert compact(engine, document(5))["refused"] == "taken"
        assert ask(engine, "load", name="contract", path="x.kv")["refused"] == "taken"


def test_salts_are_kept_apart(tiny_model, tmp_path):
    """What was compacted for one tenant is nobody else's, nor is what was loaded for one."""
    path = tmp_path / "contract.kv"
    with driver.start(tiny_model, OPTIONS) as engine:
        compact(engine, document(6))
        missing = ask(
            engine, "pin", name="x", token_ids=list(document(6)), salt="s", ratio=None, end=TOKENS
        )
        assert missing == {"reached": 0, "coming": False}
        ask(engine, "save", name="contract", path=str(path))
    tensors, file = load_file(path), PrefixFile.read(path)
    header = {**vars(file.header), "salt": "tenant"}
    save_file(tensors, path, type(file.header)(**header).to_metadata())
    with driver.start(tiny_model, OPTIONS) as engine:
        assert ask(engine, "load", name="theirs", path=str(path))["salted"]
        engine.run(questions(document(6), 1))
        assert engine.totals.cache_hits == 0


def test_a_reset_drops_all(tiny_model, tmp_path):
    """Weights may have changed: vLLM's reset succeeds, also in the middle of a transfer."""
    path = tmp_path / "contract.kv"
    with driver.start(tiny_model, OPTIONS) as engine:
        compact(engine, document(7))
        ask(engine, "save", name="contract", path=str(path))
        assert engine.core.reset_prefix_cache()
        assert ask(engine, "list") == {"prefixes": []}
        assert engine.used_blocks == 0
        loading = engine.core.kv_compaction_prefixes("load", {"name": "a", "path": str(path)})
        engine.llm.llm_engine.step()
        assert engine.core.reset_prefix_cache()
        assert loading.result(1)["refused"] == "wrong"
        settle(engine)
        assert engine.used_blocks == 0
        for _ in range(70):  # the workers are told when dead entries are swept
            engine.run([Ask((5, 6, 7), 1)], names="x")
        assert engine.worker._compaction.published == {}


@pytest.mark.parametrize("part", ["protected.L0H0.keys", "0.L1H1.bias"])
def test_numbers_that_are_not_finite(tiny_model, tmp_path, saved, part):
    """Are found before a block is anybody's; nothing is left behind."""
    path = tmp_path / "hostile.kv"
    tensors, file = load_file(saved), PrefixFile.read(saved)
    tensors[part] = tensors[part].clone()
    tensors[part].view(-1)[3] = float("nan")
    save_file(tensors, path, file.header.to_metadata())
    with driver.start(tiny_model, EXACT) as engine:
        answer = ask(engine, "load", name="x", path=str(path))
        assert answer["refused"] == "wrong" and part in answer["says"]
        settle(engine)
        assert engine.used_blocks == 0
        assert ask(engine, "list") == {"prefixes": []}
        assert ask(engine, "load", name="x", path=str(saved))["tokens"] == TOKENS
    with (
        pytest.raises(CompactionConfigError, match=r"--kv-compaction-preload: .*is not finite"),
        driver.start(tiny_model, {**EXACT, "preload": [str(path)]}),
    ):
        pass


def test_a_folder_that_cannot_be_written(tiny_model, tmp_path):
    with driver.start(tiny_model, OPTIONS) as engine:
        compact(engine, document(8))
        answer = ask(engine, "save", name="contract", path=str(tmp_path / "no" / "a.kv"))
        assert answer["refused"] == "wrong" and "cannot be written" in answer["says"]
        settle(engine)
        assert ask(engine, "drop", name="contract")["tokens"] == TOKENS
        assert engine.used_blocks == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "force_async"), [(97, False), (81, True)], ids=["sync", "async"]
)
def test_everything_at_once_adds_up(tiny_model, tmp_path, blocks, force_async):
    """Names, files and resets in the middle of serving, aborts, a pool that evicts: every reference
    is accounted for in every step, no pinned page changes, exact answers are stock vLLM's."""
    rng = random.Random(blocks)
    documents = [random_prompt(rng, rng.randrange(300, 480)) for _ in range(3)]
    asks = []
    for index in range(40):
        own = random_prompt(rng, rng.randrange(20, 60))
        extra = rng.choice([None, None, None, {"kv_compaction": "off"}])
        aborted = index // 2 + 8 if index % 7 == 3 else None
        asks.append(
            Ask((*rng.choice(documents), *own), rng.randrange(4, 30), extra, index // 2, aborted)
        )
    sizes = {"num_gpu_blocks_override": blocks, "max_model_len": 1024}
    exact = {str(i) for i, a in enumerate(asks) if a.extra_args and not a.aborted}
    with driver.start(tiny_model, max_model_len=1024) as engine:
        stock = engine.run(asks)
    answers, waiting, sums = [], [], {}

    def act(engine, step):
        commands, number = engine.core.kv_compaction_prefixes, rng.randrange(3)
        name = {"name": f"name-{number}"}
        path = {"path": str(tmp_path / f"{number}.kv")}
        action = rng.choice(["pin", "pin", "drop", "save", "load", "list"])
        if action == "load" or (action == "drop" and rng.random() < 0.5):
            name = {"name": f"loaded-{number}"}
        if step % 60 == 59:
            engine.core.reset_prefix_cache()
        if action == "pin":
            text = {"token_ids": list(documents[number]), "salt": None, "ratio": None}
            waiting.append((action, commands(action, {**name, **text, "end": 128})))
        elif action in ("save", "load"):
            waiting.append((action, commands(action, {**name, **path})))
        elif action:
            waiting.append((action, commands(action, name if action == "drop" else {})))
        for done in [w for w in waiting if not isinstance(w[1], Future) or w[1].done()]:
            waiting.remove(done)
            answer = done[1].result() if isinstance(done[1], Future) else done[1]
            answers.append((done[0], "refused" not in answer and "reached" not in answer))
        state = engine.worker._compaction
        for prefix in engine.scheduler.compaction.names:
            for entry in prefix.chain:
                pages = torch.cat(state.published[entry.segment_id][1])
                now = float(state.kv.pages[pages].double().sum())
                assert sums.setdefault(entry.segment_id, now) == now, "a pinned page has changed"

    options = {**OPTIONS, "threshold": 160, "query_pool_share": 1.0}
    with driver.start(tiny_model, options, force_async, **sizes) as engine:
        engine.before_step = act
        outputs = engine.run(asks)
        settle(engine)
        assert {name: outputs[name] for name in exact} == {name: stock[name] for name in exact}
        assert {action for action, done in answers if done} == {
            *("pin", "drop", "save", "load", "list")
        }, answers
        assert engine.used_blocks == engine.scheduler.compaction.names.block_count
        for name in [prefix.name for prefix in engine.scheduler.compaction.names]:
            ask(engine, "drop", name=name)
        assert engine.used_blocks == 0
    assert sums and not list(tmp_path.glob(".*"))
