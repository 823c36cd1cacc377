"""Answers after compaction, on the bundled model: quality in the engine, not only in the fit."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

from benchmarks.quality import engine_backend, rounds
from benchmarks.quality.conversations import Mode, grade, make_conversations
from benchmarks.recall.documents import is_correct, make_document, messages
from tests.engine import driver
from tests.engine.driver import BLOCK, ROOT, Ask

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = ROOT / "benchmarks" / "recall" / "model"
#: Every fit at once, so that answers come from the compacted cache.
OPTIONS = {"threshold": 800, "query_pool_share": 1.0}


def _right_answers(engine, extra_args=None, count=16):
    """How many of the first questions about two held-out documents are answered right."""
    tokenizer = engine.llm.get_tokenizer()
    asks, questions = [], []
    for seed in (501, 502):
        document = make_document(seed, tokens=1600)
        for question in document.questions[: count // 2]:
            ids = tokenizer.apply_chat_template(
                messages(document, question), add_generation_prompt=True, return_dict=False
            )
            asks.append(Ask(tuple(ids), 24, extra_args))
            questions.append(question)
    outputs = engine.run(asks)
    end = tokenizer.eos_token_id
    right = 0
    for index, question in enumerate(questions):
        tokens = outputs[str(index)]
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        right += is_correct(question, tokenizer.decode(tokens, skip_special_tokens=True))
    return right, len(questions)


def test_answers_survive_ten_times_less_memory():
    """The promise, in short: full cache nearly perfect, 10x at least 90 % of it."""
    with driver.start(MODEL, {**OPTIONS, "ratio": "10x"}, max_model_len=4096) as engine:
        full, asked = _right_answers(engine, {"kv_compaction": "off"})
        assert engine.totals.compactions == 0
        compacted, _ = _right_answers(engine)
        totals = engine.totals
        assert totals.compactions + totals.cache_adoptions + totals.cache_hits == asked
    assert full >= 0.9 * asked
    assert compacted >= 0.9 * full


def test_nothing_but_the_context_has_the_answers():
    """The measure itself: with all but the end of the document gone, the answers go too."""
    options = {**OPTIONS, "ratio": 0.002, "recent_tokens": 32, "method": "recent"}
    with driver.start(MODEL, options, max_model_len=4096) as engine:
        right, asked = _right_answers(engine)
        totals = engine.totals
        assert totals.compactions + totals.cache_adoptions + totals.cache_hits == asked
    assert right <= 0.5 * asked


def test_museum_19_answers_survive_rounds_of_merging():
    """Two documents grow token by token; what is old has been compacted anew five times and more.

    Nearly all answers are right, and almost as certain as with the full cache: without the bias of
    the segments that are merged the loss would be several times the bound.
    """
    conversations = [
        conversation
        for seed in (501, 502)
        for conversation in make_conversations(seed, 1600, "sparse", Mode.AFTER)
    ]
    (result,) = engine_backend.run(
        MODEL,
        {**rounds.COMMON, **rounds.growing(2), "merge_slots": 4 * BLOCK},
        [rounds.growing(2)["ratio"]],
        conversations,
        Mode.AFTER,
        prefilled=rounds.PREFILLED,
    )
    assert not result.failures and result.merges >= 5 * len(conversations)
    # The protected block, four or five of segments, up to five exact ones.
    assert max(result.held) <= 11 < result.full_blocks / 4
    found = grade(conversations, result.scores)
    counts = found.counts.values()
    assert sum(c.right for c in counts) >= 0.97 * sum(c.asked for c in counts)
    assert found.nll < 0.015


def test_demo(tmp_path):
    """``make demo`` in small: runs, keeps its promise, and writes table and plot."""
    command = "--documents 1 --questions 6 --ratios 2x --tokens 1200 --output"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", *command.split(), str(tmp_path)],
        check=True,
        cwd=ROOT,
        timeout=500,
    )
    with (tmp_path / "demo.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert "2x" in (tmp_path / "demo.md").read_text()
