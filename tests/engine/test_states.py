"""Models of which some layers hold a state: the others are compacted, these go on."""

from __future__ import annotations

import random
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from tests.engine import driver
from tests.engine.alike import assert_alike, assert_differs
from tests.engine.models import make_state_model
from tests.engine.quarter import check_a_quarter
from vllm_am.config import CompactionConfigError, Threshold
from vllm_am.engine.footprint import Footprint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

IDENTITY = {"ratio": 1.0, "threshold": 192, "recent_tokens": 16}
#: vLLM's CPU build cannot cache the states of Mamba 2; those of linear attention it can.
NOT_CACHED = {"enable_prefix_caching": False}
CHUNKED = {"max_num_batched_tokens": 192, "max_num_seqs": 16, **NOT_CACHED}
#: What 32 become, so that a block holds a state: of the Granite model, of the Qwen model, whose
#: states vLLM keeps in float32 where this CPU has a faster kernel for them.
BLOCK, LARGE_BLOCK = 64, 288 if torch.cpu._is_avx512_bf16_supported() else 160


@pytest.fixture(scope="module")
def granite(tmp_path_factory, plugin):
    return make_state_model(tmp_path_factory.mktemp("granite"), "GraniteMoeHybrid")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, plugin):
    return make_state_model(tmp_path_factory.mktemp("qwen"), "Qwen3Next")


@pytest.fixture(scope="module")
def asks():
    return driver.mixed_asks(32, seed=3)


@pytest.fixture(scope="module")
def expected(granite, asks):
    with driver.start(granite, **NOT_CACHED) as engine:
        return engine.run(asks)


@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_identity_in_a_tight_pool(granite, asks, expected, force_async):
    tight = {**CHUNKED, "num_gpu_blocks_override": 61}
    with driver.start(granite, IDENTITY, force_async=force_async, **tight) as engine:
        assert len(engine.scheduler.compaction.blocks.states) == 2
        assert len(engine.worker._compaction.layers) == 2
        assert engine.run(asks) == expected
        assert engine.totals.compactions >= 12 and not engine.totals.failures
        assert engine.used_blocks == 0


@pytest.mark.parametrize(
    "case",
    [
        {"v2": True},
        {"options": {"tensor_parallel_size": 2}},
    ],
    ids=["v2", "tp2"],
)
def test_identity_in_other_setups(granite, asks, expected, case):
    result = driver.run_case(
        {
            "model": str(granite),
            "asks": [asdict(ask) for ask in asks],
            "kv_compaction": IDENTITY,
            "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "options" in case else {},
            **case,
            "options": {**CHUNKED, **case.get("options", {})},
        }
    )
    assert result["compactions"] >= 12 and not result["failures"]
    assert result["used_blocks"] == 0
    assert result["outputs"] == expected


def likely(engine, asks, names):
    """By request, the log-probabilities of the likeliest tokens at every position."""
    engine.logprobs = 8
    engine.run(asks, names=names)
    return [engine.likely[f"{names}{index}"] for index in range(len(asks))]


def test_linear_attention(qwen, monkeypatch):
    """Qwen3-Next, which vLLM's CPU build runs in bfloat16 alone, with states that are cached."""
    from vllm_am.engine.scheduler.planner import Planner

    rng = random.Random(2)
    asks = [
        driver.Ask(driver.random_prompt(rng, n), 4)
        for n in (1500, 1280 // LARGE_BLOCK * LARGE_BLOCK)
    ]
    off = {"kv_compaction": "off"}
    exact = [driver.Ask((*ask.prompt, 9), 4, off) for ask in asks]
    options = {"dtype": "bfloat16", "num_gpu_blocks_override": 150, "skip_tokenizer_init": True}
    options["max_num_batched_tokens"] = 2 * LARGE_BLOCK
    # By default vLLM keeps states of a prompt's end only, and nothing is left of a shorter hit.
    options["prefix_cache_retention_interval"] = LARGE_BLOCK
    with driver.start(qwen, **options) as engine:
        stock = {"all": likely(engine, asks, "all"), "exact": likely(engine, exact, "exact")}
    compaction = {"ratio": 1.0, "threshold": 2 * LARGE_BLOCK + 80}
    with driver.start(qwen, compaction, **options) as engine:
        assert engine.scheduler.compaction.limits.block_size == LARGE_BLOCK
        assert engine.scheduler.compaction.limits.page_slots == 16
        assert_alike(likely(engine, asks, "all"), stock["all"])
        assert engine.totals.compactions == 2 and not engine.totals.failures
        # A hit that is cut short has the state at its new end.
        with monkeypatch.context() as patch:
            patch.setattr(Planner, "longest_hit", lambda *_: 3 * LARGE_BLOCK - 1)
            again = [replace(ask, extra_args=None) for ask in exact]
            assert_alike(likely(engine, again, "cut"), stock["exact"])
        assert engine.cached_tokens["cut0"] == 2 * LARGE_BLOCK
        assert engine.used_blocks == 0
        # What has seen a segment is nobody else's prefix: vLLM files the state at a prompt's end.
        assert engine.llm.reset_prefix_cache()
        lossy = [replace(ask, extra_args={"kv_compaction_ratio": 0.02}) for ask in asks]
        assert_differs(likely(engine, lossy, "lossy"), stock["all"])
        assert_alike(likely(engine, exact, "exact"), stock["exact"])
        assert_alike(likely(engine, exact, "again"), stock["exact"])
        assert engine.cached_tokens["again0"] >= 2 * LARGE_BLOCK


def test_a_quarter_frees_the_blocks_of_the_formula(granite):
    """Of the layers that are compacted; the others hold one state whatever happens."""
    assert check_a_quarter(granite, BLOCK) == [1, 1, 1]


def test_a_pool_that_holds_one_sequence_serves_many(granite):
    """Sequences are compacted as they go, preempted, and end; nobody waits for ever."""
    rng = random.Random(1)
    asks = [driver.Ask(driver.random_prompt(rng, 900 + 100 * i), 30, arrives=i) for i in range(6)]
    options = {**CHUNKED, "num_gpu_blocks_override": 46}
    for threshold in (256, "30%"):
        compaction = {"ratio": 0.1, "threshold": threshold, "recent_tokens": 32}
        with driver.start(granite, compaction, **options) as engine:
            outputs = engine.run(asks)
            assert all(len(output) == 30 for output in outputs.values())
            assert engine.totals.compactions >= 1 and engine.used_blocks == 0
            planner = engine.scheduler.compaction.planner
            assert (planner.other_groups, planner.other_blocks) == (2, 2)


def test_budgets_of_copying_heads(granite):
    """The pass that finds them reads a text as any other request would."""
    ask = driver.Ask(driver.random_prompt(random.Random(7), 700), 12)
    compaction = {"ratio": 0.25, "threshold": 256, "recent_tokens": 32, "budgets": "auto"}
    with driver.start(granite, compaction, **NOT_CACHED) as engine:
        assert len(engine.worker._compaction.fitting.head_weights) == 4
        assert len(engine.run([ask])["0"]) == 12
        assert engine.totals.compactions == 1 and not engine.totals.failures
        assert engine.used_blocks == 0
    with driver.start(granite, {**compaction, "ratio": 1.0}, **NOT_CACHED) as engine:
        ours = engine.run([ask])
    with driver.start(granite, **NOT_CACHED) as engine:
        assert ours == engine.run([ask]), "nothing of that text is left"


@pytest.mark.parametrize(
    ("compaction", "options", "message"),
    [
        ({"queries": "repeat-prefill"}, {}, "queries='?repeat-prefill.*use context-rotated, con"),
        ({"cache": "on"}, {}, "cache=on.*state-space or linear-attention layers"),
        ({}, {"prefix_match_unit": 16}, "prefix-match-unit.*drop --prefix-match-unit"),
    ],
    ids=["passes", "cache", "hits-within-blocks"],
)
def test_what_states_rule_out(granite, compaction, options, message):
    from vllm_am.engine.capabilities import UnsupportedByCompaction

    with (
        pytest.raises((CompactionConfigError, UnsupportedByCompaction), match=message),
        driver.start(granite, {**IDENTITY, **compaction}, **options),
    ):
        pass


def test_a_sequence_of_128k_shrinks_sevenfold():
    """Qwen3.6-27B, 10x: blocks of 784 tokens, one group that grows and three with a state."""
    footprint = Footprint(
        threshold=Threshold(tokens=16384),
        block_size=784,
        recent_tokens=64,
        min_span_tokens=512,
        max_span_tokens=16384,
        protected_tokens=784,
    )
    tokens, states, ratio = 131072, 3, 0.1
    whole = -(-tokens // 784) + states
    end = (tokens - footprint.recent_tokens) // 784 * 784
    held, start = -(-(tokens - end) // 784) + states + 1, footprint.protected_tokens
    while start < end:
        span = min(end - start, footprint.longest_span)
        held += footprint.span_blocks(span, ratio)
        start += span
    assert whole / held >= 7
    assert replace(footprint, block_size=16).span_blocks(15680, ratio) * 16 == 1568


def test_what_has_seen_a_segment_is_not_filed():
    """In no layer with a state: where blocks of the exact text are still cached, another request
    would begin on it."""
    from vllm_am.engine.scheduler.state import _file_states_of_exact_text

    filed = []
    manager = SimpleNamespace(
        num_cached_block={"new": 0, "compacted": sys.maxsize},
        cache_blocks=lambda request, tokens, **_: filed.append((request.request_id, tokens)),
    )
    _file_states_of_exact_text(manager)
    for name in ("new", "compacted", "unknown"):
        manager.cache_blocks(SimpleNamespace(request_id=name), 64, replay_boundaries=())
    assert filed == [("new", 64), ("unknown", 64)]
