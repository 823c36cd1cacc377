"""Museum row 18: every option changes what the engine does."""

from __future__ import annotations

import contextlib
import random
from dataclasses import fields
from pathlib import Path

import pytest

from tests.engine import driver
from tests.engine.driver import Ask, random_prompt
from vllm_am.config import CompactionConfig

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BASE = {"ratio": 0.25, "threshold": 256}
SHARE = {"ratio": 0.25, "threshold": "40%"}
REPEAT = {**BASE, "queries": "repeat-prefill", "pass_tokens": 256}
STUDY = {**BASE, "queries": "self-study", "starters": ("w5 w6", "w7"), "self_study_tokens": 6}
PROMPTS = {**BASE, "queries": "prompts", "prompts_tokens": 6}
ASKED = {**PROMPTS, "prompts_file": "one.txt"}
ASKED_IDS = {**PROMPTS, "reference_prompts": {"prompts": [[7, 8]]}}

#: option -> (what is served without it, the value that must change something)
CASES: dict[str, tuple[dict, object]] = {
    "ratio": (BASE, 0.5),
    "threshold": (BASE, 1800),
    "method": (BASE, "test-copies-values"),
    "budgets": (BASE, "uniform"),
    "reference_queries": (BASE, 512),
    "queries": (BASE, {"context-prefill": 0.5, "random": 0.5}),
    "instruction": (REPEAT, "w9 w9 w9 w9 w9 w9 w9"),
    "starters": (STUDY, ("w5 w6 w7 w8", "w9")),
    "self_study_tokens": (STUDY, 3),
    "prompts_file": (ASKED, "two.txt"),
    "prompts_tokens": (ASKED, 3),
    "pass_tokens": (REPEAT, 128),
    "on_policy": (REPEAT, True),
    "reference_prompts": (ASKED_IDS, {"prompts": [[7, 8, 9, 10]]}),
    "query_pool_share": (BASE, 1.0),
    "heldout_share": (BASE, 0.5),
    "max_error": (BASE, 1e-6),
    "recent_tokens": (BASE, 150),
    "protected_tokens": (BASE, 100),
    "min_span_tokens": (SHARE, 1400),
    "max_span_tokens": (BASE, 320),
    "merge_slots": ({**BASE, "max_span_tokens": 320}, 200),
    "step_ms": (BASE, 0.001),
    "pressed_step_ms": ({**BASE, "step_ms": 0.001}, 1e6),
    "cache": (BASE, "off"),
}

#: What changes nothing until somebody asks for a named prefix, and the tests that do.
ELSEWHERE = {
    "preload": "test_named_prefixes.py",
    "load_any_options": "test_named_prefixes.py",
    "pinned_share": "test_named_prefixes.py",
    "prefix_folder": "test_prefix_server.py",
}


def _served(model, options):
    """What compaction did with two long requests: every slice of work, every measured error."""
    asks = [Ask(random_prompt(random.Random(i), 1400), 20) for i in range(2)]
    with driver.start(model, options, num_gpu_blocks_override=81) as engine:
        slices = []
        issue = engine.scheduler.compaction.jobs.slices

        def spy():
            for fit in issue():
                slices.append((fit.segment, fit.measures, fit.heads, len(fit.query_slots)))
                yield fit

        engine.scheduler.compaction.jobs.slices = spy
        outputs = engine.run(asks)
        positions = len(next(iter(engine.worker._compaction.queries.values())))
        return slices, engine.totals.output_errors, outputs, positions


@pytest.fixture(scope="module", autouse=True)
def question_files(tmp_path_factory):
    """The files of ``prompts_file``, in the current directory."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "one.txt").write_text("w7 w8\n")
    (folder / "two.txt").write_text("w7 w8 w9\nw10\n")
    with contextlib.chdir(folder):
        yield


def test_every_option_has_a_case():
    assert set(CASES) | set(ELSEWHERE) == {f.name for f in fields(CompactionConfig)}
    for name, file in ELSEWHERE.items():
        assert f'"{name}"' in (Path(__file__).parent / file).read_text()


@pytest.fixture(scope="module")
def base(tiny_model):
    """What is served without the option, for the few different bases."""
    known: dict[str, object] = {}

    def get(options):
        if repr(options) not in known:
            known[repr(options)] = _served(tiny_model, options)
        return known[repr(options)]

    return get


@pytest.mark.parametrize("option", CASES)
def test_museum_18_option_changes_what_the_engine_does(tiny_model, base, monkeypatch, option):
    from dataclasses import replace

    from vllm_am.compaction import METHODS

    monkeypatch.setitem(
        METHODS,
        "test-copies-values",
        replace(METHODS["highest-attention"], name="test-copies-values", fits_values=False),
    )
    options, value = CASES[option]
    assert _served(tiny_model, {**options, option: value}) != base(options)
