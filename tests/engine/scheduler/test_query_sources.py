"""Which reference passes are planned, and which of the sampled queries make up a mixture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_am.config import CompactionConfig
from vllm_am.engine.scheduler.query_sources import (
    PassPlan,
    plan_passes,
    read_together,
    select,
    shifts_behind,
    thin,
)

PROMPTS = {
    "repeat-prefill": [[90, 91, 92]],
    "self-study": [[80, 81], [82, 83, 84]],
    "prompts": [[70, 71]],
}
NO_LIMIT = 1 << 20


def config(queries, **options):
    sources = [queries] if isinstance(queries, str) else list(queries)
    given = {s: PROMPTS[s] for s in sources if s in PROMPTS}
    return CompactionConfig.from_dict(
        {"queries": queries, "reference_prompts": given or None, **options}
    )


# -- passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["context-prefill", "random"])
def test_sources_without_passes_plan_none(queries):
    assert plan_passes(config(queries), range(500), NO_LIMIT, 1000) == []


def test_what_the_model_wrote_is_read_again():
    plan = PassPlan("self-study", (1, 2), 64, 0.5)
    assert plan.written([7, 8, 9]) == PassPlan("self-study", (1, 2, 7, 8), 0, 0.5)
    assert plan.written([7]).tokens == plan.written([]).tokens == (1, 2)


def test_one_step_reads_evenly_chosen_passes():
    plans = [PassPlan("repeat-prefill", tuple(range(i, i + 10)), 0, 0.25) for i in range(6)]
    assert read_together(plans, 8, 60, 100) == plans
    first_tokens = [plan.tokens[0] for plan in read_together(plans, 8, 35, 100)]
    assert first_tokens == [1, 3, 5], "three of six: one of each pair"
    (one,) = read_together(plans, 1, 60, 100)
    assert one.sample_rate == 1.0, "all of a sixth is less than a quarter of everything"
    halves = read_together(plans, 3, 60, 100)
    assert [plan.sample_rate for plan in halves] == [0.5] * 3
    assert read_together(plans, 8, 9, 100) == [], "no pass fits"
    assert read_together(plans, 8, 60, 9) == [], "all would be cut into chunks"
    assert read_together([], 8, 60, 100) == []


def test_short_span_is_repeated_in_one_pass():
    """As in the paper: the instruction, then the whole span, teacher-forced."""
    (plan,) = plan_passes(config("repeat-prefill"), range(500), NO_LIMIT, NO_LIMIT)
    assert plan == PassPlan("repeat-prefill", (90, 91, 92, *range(500)), 0, 1.0)
    assert plan.length == 503


@pytest.mark.parametrize("tokens", [62, 63, 500, 1000])
@pytest.mark.parametrize("pass_tokens", [64, 128])
def test_long_span_is_repeated_in_stretches_that_cover_it(tokens, pass_tokens):
    plans = plan_passes(
        config("repeat-prefill", pass_tokens=pass_tokens), range(tokens), NO_LIMIT, NO_LIMIT
    )
    assert all(plan.tokens[:3] == (90, 91, 92) for plan in plans)
    assert [token for plan in plans for token in plan.tokens[3:]] == list(range(tokens))
    lengths = [plan.length for plan in plans]
    assert max(lengths) <= pass_tokens and max(lengths) - min(lengths) <= 1
    assert len(plans) == -(-tokens // (pass_tokens - 3))


def test_repetition_fits_the_positions_left():
    """Close to max_model_len shorter stretches do; without room for any there is no pass."""
    plans = plan_passes(config("repeat-prefill"), range(500), 40, NO_LIMIT)
    assert max(plan.length for plan in plans) < 40
    assert sum(plan.length - 3 for plan in plans) == 500
    assert plan_passes(config("repeat-prefill"), range(500), 19, NO_LIMIT) == []


def test_what_the_model_writes_is_bounded_by_the_option_and_the_room():
    mixture = {"self-study": 0.5, "prompts": 0.5}
    asked = config(mixture, self_study_tokens=20, prompts_tokens=7)
    plans = plan_passes(asked, range(500), NO_LIMIT, NO_LIMIT)
    assert [(p.source, p.tokens, p.answer_tokens) for p in plans] == [
        ("self-study", (80, 81), 20),
        ("self-study", (82, 83, 84), 20),
        ("prompts", (70, 71), 7),
    ]
    assert plans[0].length == 21, "the last token written is not computed"
    tight = plan_passes(asked, range(500), 6, NO_LIMIT)
    assert [p.answer_tokens for p in tight] == [3, 2, 3]
    assert all(len(p.tokens) + p.answer_tokens < 6 for p in tight)


def test_samples_of_all_passes_together_fill_the_fraction():
    mixture = {"repeat-prefill": 0.25, "self-study": 0.75}
    plans = plan_passes(config(mixture, pass_tokens=64), range(2000), NO_LIMIT, 400)
    repeated = [p for p in plans if p.source == "repeat-prefill"]
    kept = sum(p.length * p.sample_rate for p in repeated)
    assert kept == pytest.approx(0.25 * 400)
    assert all(p.sample_rate == pytest.approx(300 / 515) for p in plans if p not in repeated)


# -- mixtures -------------------------------------------------------------------------------------


def slots(first, count):
    return np.arange(first, first + count, dtype=np.int64)


def chosen(fractions, found, positions=100, keep_last=8, cut_short=False):
    result = select(found, fractions, positions, keep_last, cut_short)
    assert result.dtype == np.int64 and len(set(result.tolist())) == len(result)
    return {
        source: np.intersect1d(result, available).tolist() for source, available in found.items()
    }


def test_each_source_gives_its_fraction_at_most():
    found = {"context": slots(0, 500), "self-study": slots(1000, 60)}
    got = chosen({"context-prefill": 0.3, "self-study": 0.7}, found)
    assert len(got["context"]) == 30
    assert got["self-study"] == list(range(1000, 1060)), "no source makes up for another"


def test_the_end_of_the_context_stays():
    """The question is at the end of the prompt, where there is one."""
    got = chosen({"context-prefill": 1.0}, {"context": slots(0, 500)}, keep_last=64)
    assert got["context"][-64:] == list(range(436, 500))
    assert len(got["context"]) == 100


def test_context_is_left_out_unless_asked_for():
    found = {"context": slots(0, 500), "repeat-prefill": slots(1000, 300)}
    got = chosen({"repeat-prefill": 1.0}, found)
    assert got["context"] == [] and len(got["repeat-prefill"]) == 100


@pytest.mark.parametrize(("left", "filled"), [(0, 100), (30, 70), (100, 0)])
def test_context_fills_up_for_passes_that_were_cut_short(left, filled):
    found = {"context": slots(0, 500), "repeat-prefill": slots(1000, left)}
    got = chosen({"repeat-prefill": 1.0}, found, cut_short=True)
    assert (len(got["repeat-prefill"]), len(got["context"])) == (left, filled)


def test_random_part_leaves_its_share_to_itself():
    found = {"context": slots(0, 500)}
    assert len(chosen({"context-prefill": 0.4, "random": 0.6}, found)["context"]) == 40
    short = {"self-study": 0.4, "random": 0.6}
    assert len(chosen(short, found, cut_short=True)["context"]) == 40


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 80), st.integers(0, 1 << 16))
def test_thinning_is_even_ordered_and_exact(length, count, keep_last, first):
    thinned = thin(slots(first, length), count, keep_last)
    assert len(thinned) == min(length, count)
    assert np.all(np.diff(thinned) > 0)
    last = min(keep_last, count, length)
    assert thinned[len(thinned) - last :].tolist() == list(
        range(first + length - last, first + length)
    )
    body = np.diff(thinned[: len(thinned) - last])
    assert len(body) == 0 or length <= count or body.max() - body.min() <= 1


def test_context_queries_land_behind_the_span_in_their_order():
    positions = np.array([32, 40, 100, 200, 260, 300])
    shifts = shifts_behind(positions, end=200)
    assert (positions + shifts).tolist() == [200, 208, 268, 200, 260, 300]
    assert shifts_behind(positions[:0], end=200).tolist() == []
