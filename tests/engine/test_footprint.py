"""What a sequence needs of the pool. That it is enough: scheduler/test_planner.py."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_am.config import Threshold
from vllm_am.engine.footprint import Footprint, slots_for


def make_footprint(threshold: int | float | Threshold = 512, **changes) -> Footprint:
    """A threshold in tokens (int) or as a share of the pool (float)."""
    if isinstance(threshold, int):
        threshold = Threshold(tokens=threshold)
    elif isinstance(threshold, float):
        threshold = Threshold(pool_share=threshold)
    options = {
        "threshold": threshold,
        "block_size": 16,
        "recent_tokens": 64,
        "min_span_tokens": 256,
        "max_span_tokens": 16384,
        "protected_tokens": 16,
        "in_flight_tokens": 64,
        **changes,
    }
    return Footprint(**options)


ratios = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0]) | st.floats(0.01, 1.0)


# The first of them to run imports what hypothesis needs for floats, which takes a second or more.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(tokens=st.integers(1, 200_000), ratio=ratios)
def test_slots_are_never_more_than_the_tokens_nor_none(tokens, ratio):
    assert 1 <= slots_for(tokens, ratio) <= tokens


@pytest.mark.parametrize(
    "ratio",
    ["0.01", "0.02", "1/30", "0.05", "0.07", "0.1", "0.3", "1/3", "0.6", "0.9", "0.99", "1"],
)
def test_slots_are_the_exact_ceiling(ratio):
    exact = Fraction(ratio)
    lengths = [*range(1, 3000), *range(16, 131073, 1616), 99_999, 131_072]
    wrong = [t for t in lengths if slots_for(t, float(exact)) != math.ceil(exact * t)]
    assert wrong == []


@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 2 / 3, 0.75, 0.9, 0.95, 0.99])
def test_shortest_span_is_the_first_that_gives_a_block_back(block_size, ratio):
    footprint = make_footprint(
        0.5, block_size=block_size, min_span_tokens=1, max_span_tokens=1 << 20
    )
    shortest = footprint.shortest_span(ratio)
    frees = [k for k in range(1, 400) if footprint.span_blocks(k * block_size, ratio) < k]
    assert shortest == frees[0] * block_size
    assert frees == list(range(frees[0], 400))


def test_peak_is_the_whole_sequence_where_compaction_frees_nothing():
    assert make_footprint().peak_tokens(1.0, 100_000) == 100_000
    # At 0.99 a span gives a block back from 100 blocks on: never, if spans are shorter.
    assert make_footprint(max_span_tokens=1024).peak_tokens(0.99, 100_000) == 100_000
    assert make_footprint().peak_tokens(0.1, 100_000) < 20_000


#: Options, ratio, longest sequence, whether it is ever compacted. Blocks of 16, one protected.
USES = {
    "default-like": ({}, 0.1, 1024, True),
    "threshold-not-reached": ({}, 0.1, 512, False),
    "recent-take-all": ({"recent_tokens": 1000}, 0.1, 1024, False),
    "recent-leave-two-blocks": ({"recent_tokens": 976}, 0.1, 1024, True),
    "recent-leave-one-block": ({"recent_tokens": 990}, 0.1, 1024, False),
    "protected-take-all": ({"protected_tokens": 1024}, 0.1, 1024, False),
    "spans-of-one-block": ({"max_span_tokens": 16}, 0.1, 1024, False),
    "nothing-comes-free": ({}, 0.99, 1024, False),
    "something-comes-free": ({}, 0.99, 4096, True),
    "everything-is-kept": ({}, 1.0, 1024, True),
    "share-of-the-pool": ({"threshold": Threshold(pool_share=0.5)}, 0.1, 1024, True),
    "span-too-short-for-a-share": (
        {"threshold": Threshold(pool_share=0.5), "min_span_tokens": 960},
        0.1,
        1024,
        False,
    ),
}


@pytest.mark.parametrize("case", USES.values(), ids=USES.keys())
def test_whether_anything_is_ever_compacted(case):
    options, ratio, tokens, expected = case
    assert make_footprint(**options).compacts(ratio, tokens) == expected


@pytest.mark.parametrize(
    ("block_size", "threshold", "ratio", "reached"),
    [
        (16, 4096, 0.1, (9.6, 10.0)),
        (128, 4096, 0.1, (7.8, 10.0)),
        (128, 4096, 0.02, (25.5, 50.0)),  # 6,400 tokens fill a block, 6,528 take another
        # A short span: whatever is asked for, a block is held of it.
        (32, 160, 0.02, (2.0, 50.0)),
        (32, 160, 0.1, (2.0, 10.0)),
        (32, 160, 0.5, (1.5, 2.0)),
    ],
)
def test_what_a_ratio_becomes_in_whole_blocks(block_size, threshold, ratio, reached):
    footprint = make_footprint(threshold, block_size=block_size, protected_tokens=block_size)
    assert footprint.reached(ratio) == pytest.approx(reached, abs=0.06)
