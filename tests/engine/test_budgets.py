"""Non-uniform budgets in the real engine: heads differ, the blocks held do not."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest

from benchmarks.page_overhead import layout, serve
from tests.engine import driver
from tests.engine.driver import BLOCK, Ask, random_prompt
from tests.engine.models import make_random_model
from vllm_am.compaction.pages import PAGE_SLOTS

pytestmark = [pytest.mark.engine]

OPTIONS = {"ratio": 0.4, "threshold": 512, "recent_tokens": 64}
LAYERS, HEADS = 3, 2
PAGES = BLOCK // PAGE_SLOTS  # of a head in a block
EVEN = {f"L{layer}H{head}": 1.0 for layer in range(LAYERS) for head in range(HEADS)}


def _serve(model, budgets, **options):
    """Pages per (layer, head), blocks of the compacted part, and the tokens of one request."""
    pages = []

    def watch(engine, step):
        for sequence in engine.worker._compaction.sequences.values():
            pages[:] = [len(ids) for ids in sequence.lists]
            everything = [page for ids in sequence.lists for page in ids.tolist()]
            assert len(set(everything)) == len(everything), "no page serves two heads"

    ask = Ask(random_prompt(random.Random(0), 1800), 12)
    with driver.start(model, {**OPTIONS, "budgets": budgets}, **options) as engine:
        engine.before_step = watch
        outputs = engine.run([ask])
        assert engine.totals.compactions == 1 and not engine.totals.failures
        assert engine.used_blocks == 0
        return pages, engine.totals.slots // BLOCK, outputs["0"]


@pytest.mark.slow
def test_blocks_are_the_sum_of_the_budgets(tiny_model, tmp_path):
    """Uniform, global and a file: the pages of all heads are the pages of the blocks held."""
    uniform, blocks, _ = _serve(tiny_model, "uniform")
    assert uniform == [blocks * PAGES] * (LAYERS * HEADS)
    shares = {f"L{layer}H{head}": layer + head / 2 for layer in range(LAYERS) for head in range(2)}
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(shares))
    by_file, file_blocks, file_tokens = _serve(tiny_model, str(path))
    by_score, score_blocks, score_tokens = _serve(tiny_model, "global")
    for pages in (by_file, by_score):
        assert sum(pages) == sum(uniform) and len(set(pages)) > 1
    assert file_blocks == score_blocks == blocks
    # Heads of the file's shares 0, .5, 1, 1.5, 2, 2.5 of 7.5, to the page.
    total = sum(uniform)
    assert by_file == pytest.approx([total * s / 7.5 for s in shares.values()], abs=1)
    assert by_file[0] == 0, "a share of zero keeps nothing of the span"
    assert file_tokens != score_tokens


BUDGETS = {
    "uniform": "uniform",
    "global": "global",
    "zeros": dict.fromkeys(EVEN, 0.0) | {"L0H0": 1.0, "L1H1": 1.0},
    "one hot head": EVEN | {"L1H1": 40.0},
    "one head": dict.fromkeys(EVEN, 0.0) | {"L2H0": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=BUDGETS)
def test_the_blocks_held_are_those_of_the_formula(tiny_model, budgets):
    """To the block, for spans and whole sequences, in one segment and several."""
    limits = {"threshold": 512, "recent_tokens": 40, "max_span_tokens": 700}
    options = {**limits, "budgets": budgets, "cache": "off"}
    compactions = 0
    with driver.start(tiny_model, options) as engine:
        for tokens, ratio in [(560, 0.1), (1000, 0.3), (1999, 0.1), (1999, 0.02)]:
            before, after = serve(engine, tokens, ratio)
            formula = layout(tokens, after.computed, ratio, BLOCK, **limits)
            assert after.spans == formula.spans
            assert after.span_blocks == formula.span_blocks
            assert after.blocks == formula.blocks
            assert before.blocks == -(-before.computed // BLOCK)
            assert sum(map(sum, after.pages)) == formula.span_blocks * PAGES * LAYERS * HEADS
            compactions += len(formula.spans)
        assert len(after.spans) == 3
        assert engine.totals.compactions == compactions and not engine.totals.failures


def test_identity_with_budgets_file(tiny_model):
    """At ratio 1 every head keeps everything, whatever its share: stock's tokens."""
    ask = Ask(random_prompt(random.Random(1), 600), 20)
    with driver.start(tiny_model) as engine:
        stock = engine.run([ask])
    options = {"ratio": 1.0, "threshold": 256, "budgets": {**EVEN, "L0H0": 5.0, "L2H1": 0.0}}
    with driver.start(tiny_model, options) as engine:
        assert engine.run([ask]) == stock
        assert engine.totals.compactions == 1


@pytest.mark.slow
def test_more_ranks_than_kv_heads(tmp_path):
    """Both ranks hold the only KV head of each layer, and both give it that head's share."""
    model = make_random_model(tmp_path / "one", kv_heads=1)
    prompts = [random_prompt(random.Random(i), 500) for i in range(2)]
    budgets = {"L0H0": 5.0, "L1H0": 1.0, "L2H0": 0.0}
    with driver.start(model) as engine:
        stock = engine.run([Ask(prompt, 20) for prompt in prompts])
    keep_all = {"kv_compaction_ratio": 1.0}
    asks = [Ask(prompt, 20, more) for more in (keep_all, None) for prompt in prompts]
    options = {"ratio": 0.25, "threshold": 256, "recent_tokens": 16, "budgets": budgets}
    result = driver.run_case(
        {
            "model": str(model),
            "asks": [asdict(ask) for ask in asks],
            "kv_compaction": options,
            "options": {"tensor_parallel_size": 2},
            "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        }
    )
    assert result["compactions"] == 4 and not result["failures"]
    assert [result["outputs"][str(i)] for i in range(2)] == [stock[str(i)] for i in range(2)]
    assert [result["outputs"][str(2 + i)] for i in range(2)] != [stock[str(i)] for i in range(2)]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"L3H0": 1.0}, r"L3H0 is not compacted in this model, of 3 such layers x 2 KV heads"),
        ({"L0H0": 1.0, "L2H1": 1.0}, r"L0H1 and 3 more of the model's 6 heads have no share"),
    ],
    ids=["another-model", "some-heads"],
)
def test_budgets_of_other_heads_are_refused(tiny_model, budgets, message):
    from vllm_am.config import CompactionConfigError

    with (
        pytest.raises(CompactionConfigError, match=message),
        driver.start(tiny_model, {**OPTIONS, "budgets": budgets}),
    ):
        pass
