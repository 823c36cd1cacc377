"""When sequences are compacted, and which spans: the policy, without an engine."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_am.config import Threshold
from vllm_am.engine.footprint import ceil_div, slots_for
from vllm_am.engine.scheduler.planner import Planner, SequenceView, Span

SIZE = 16


def make_planner(threshold: int | float = 512, **changes) -> Planner:
    """A threshold in tokens (int) or as a share of the pool (float)."""
    by_tokens = isinstance(threshold, int)
    options = {
        "threshold": Threshold(tokens=threshold) if by_tokens else Threshold(pool_share=threshold),
        "block_size": SIZE,
        "num_blocks": 1000,
        "recent_tokens": 64,
        "min_span_tokens": 256,
        "max_span_tokens": 16384,
        "protected_tokens": SIZE,
        "in_flight_tokens": 64,
        **changes,
    }
    return Planner(**options)


def view(computed, prompt=0, end=SIZE, ratio=0.1, limit: int | None = 512, name="a"):
    """A sequence of which [SIZE, end) is compacted and the first block is protected."""
    return SequenceView(name, computed, prompt, end, computed - end + SIZE, ratio, limit)


# -- museum row 9: the trigger --------------------------------------------------------------------

#: sequence, free blocks, the span that is due (start, end) or None. Threshold 512, 64 recent.
TRIGGERS = {
    "decode-below": (view(512), 500, None),
    "decode-above": (view(513), 500, (16, 448)),
    "relative-not-absolute": (view(10_000, end=9_600), 500, None),
    "relative-above": (view(10_097, end=9_600), 500, (9_600, 10_032)),
    "prefill-that-fits-waits": (view(2_000, prompt=8_000), 500, None),
    "prefill-that-fits-just": (view(2_000, prompt=8_000), 375 + 1 + 50, None),
    "prefill-that-does-not-fit": (view(2_000, prompt=8_000), 375 + 50, (16, 1_936)),
    "prefill-complete": (view(8_000, prompt=8_000), 500, (16, 7_936)),
    "prefill-below-does-not-fit": (view(512, prompt=8_000), 100, None),
    "own-threshold-lower": (view(300, limit=200), 500, (16, 224)),
    "own-threshold-higher": (view(2_000, limit=4_000), 500, None),
    "one-block-gives-none-back": (view(100, limit=1), 500, None),
    "two-blocks-give-one-back": (view(112, limit=1), 500, (16, 48)),
    "no-free-block": (view(2_000), 0, None),
    "one-free-block": (view(2_000), 1, (16, 176)),
    "ratio-one-gives-nothing-back": (view(2_000, ratio=1.0), 500, (16, 1_936)),
}


@pytest.mark.parametrize("case", TRIGGERS.values(), ids=TRIGGERS.keys())
def test_museum_9_trigger(case):
    sequence, free, expected = case
    got = list(make_planner().spans([sequence], free))
    assert [(span.start, span.end) for span in got] == ([expected] if expected else [])


#: Steps left, steps that a fit takes, what else is known; whether anybody gains.
PAYS = {
    "nobody knows when it ends": (None, 9, {}, True),
    "ends before": (1, 1, {}, False),
    "ends soon behind": (9, 5, {}, False),
    "lives on as long again": (10, 5, {}, True),
    "one step each": (2, 1, {}, True),
    "it insists": (0, 9, {"forced": True}, True),
    "others have marked it": (0, 9, {"marked_end": 800}, True),
    "others begin with it": (0, 9, {"common_end": lambda: 1_600}, True),
    "others begin with too little of it": (0, 9, {"common_end": lambda: 160}, False),
}


@pytest.mark.parametrize("case", PAYS.values(), ids=PAYS.keys())
def test_compactions_that_pay(case):
    left, steps, more, expected = case
    planner = make_planner(fit_steps=lambda tokens, slots: steps)
    sequence = dataclasses.replace(view(2_000), steps_left=left, **more)
    assert bool(list(planner.spans([sequence], 500))) == expected
    pressed = make_planner(0.5, fit_steps=lambda tokens, slots: steps)
    sequence = dataclasses.replace(sequence, threshold_tokens=None)
    assert bool(list(pressed.spans([sequence], 100))) == expected


def test_a_span_that_ends_where_others_go_on_is_wanted():
    planner = make_planner()
    wanted = {}
    for name, sequence in {
        "own": view(2_000),
        "common": ends(2_000, common=1_600),
        "marked": ends(2_000, marked=800),
        "first-of-several": ends(8_000, common=6_000),
        "all-of-it-was-asked-before": ends(2_000, common=1_984),
        "marked-beyond-what-is-read": ends(2_000, marked=4_000),
    }.items():
        span = planner.next_span(sequence, 500)
        assert span is not None
        wanted[name] = span.wanted
    assert wanted == {name: name != "own" for name in wanted}


def ends(computed, marked=0, common=0, end=SIZE, **kwargs):
    """A sequence with a prefix that others have."""
    return dataclasses.replace(
        view(computed, end=end, **kwargs), marked_end=marked, common_end=lambda: common
    )


#: sequence, the span that is due. Threshold 512, 64 recent tokens, blocks of 16.
PREFIXES = {
    "marked": (ends(2_000, marked=800), (16, 800)),
    "marked-short": (ends(2_000, marked=48), (16, 48)),
    "marked-one-block-gives-none-back": (ends(2_000, marked=32), (16, 1_936)),
    "marked-within-the-recent-tokens": (ends(2_000, marked=2_000), (16, 2_000)),
    "marked-and-not-yet-computed": (ends(2_000, marked=4_000), (16, 1_936)),
    "marked-and-compacted": (ends(2_000, marked=800, end=800), (800, 1_936)),
    "marked-rather-than-common": (ends(2_000, marked=800, common=1_600), (16, 800)),
    "common": (ends(2_000, common=1_600), (16, 1_600)),
    "common-half": (ends(2_000, common=976), (16, 976)),
    "common-less-than-half": (ends(2_000, common=960), (16, 1_936)),
    "common-recent": (ends(2_000, common=1_984), (16, 1_936)),
    "common-and-compacted": (ends(2_000, common=800, end=800), (800, 1_936)),
    "common-is-longest": (ends(9_000, common=6_000), (16, 6_000)),
}


@pytest.mark.parametrize(("sequence", "expected"), PREFIXES.values(), ids=PREFIXES.keys())
def test_a_span_ends_with_what_others_have(sequence, expected):
    (span,) = make_planner().spans([sequence], 500)
    assert (span.start, span.end) == expected


def test_a_common_prefix_is_cut_as_any_other_span():
    planner = make_planner(max_span_tokens=1000)
    assert planner.next_span(ends(8_000, common=6_000), 500) == Span(
        "a", 16, 16 + 992, 7 * SIZE, wanted=True
    )
    assert planner.next_span(ends(8_000, marked=1_600, end=1_008), 500).end == 1_600


def test_under_pressure_a_prefix_is_worth_a_compaction():
    """By the share of the pool: no shorter span than is worth it, whoever has marked it."""
    planner = make_planner(0.1, num_blocks=200)
    for marked, end in ((800, 800), (256, 1_936)):
        (span,) = planner.spans([ends(2_000, marked=marked, limit=None)], 70)
        assert span.end == end


def test_a_common_prefix_is_looked_for_only_when_a_span_is_due():
    def never():
        raise AssertionError("asked")

    calm = dataclasses.replace(view(500), common_end=never)
    assert not list(make_planner().spans([calm], 500))


@given(
    st.lists(st.integers(0, 9_000), min_size=1, max_size=6),
    st.sampled_from([0.02, 0.1, 0.25, 0.5]),
    st.sampled_from([512, 0.5]),
)
def test_compacted_blocks_bound_what_common_prefixes_take(commons, ratio, threshold):
    """However a sequence is cut as it grows, it takes no more than it is counted with."""
    planner = make_planner(threshold, shares=True)
    end, blocks, limit = SIZE, 0, 512 if threshold == 512 else None
    for number, common in enumerate(commons):
        computed = end + planner.shortest_span(ratio) + planner.recent_tokens + 400 * number
        marked = common if number == 0 else 0
        sequence = ends(computed, marked, common // SIZE * SIZE, end=end, ratio=ratio, limit=limit)
        sequence = dataclasses.replace(sequence, compacted_blocks=blocks)
        span = planner.next_span(sequence, 10_000)
        if span is not None:
            blocks += ceil_div(span.slots, SIZE)
            end = span.end
    assert blocks <= planner.compacted_blocks(end - SIZE, ratio)


def test_long_span_is_cut_into_segments():
    planner = make_planner(max_span_tokens=1000)
    assert planner.next_span(view(8_000), 500) == Span("a", 16, 16 + 992, 7 * SIZE)
    assert planner.next_span(view(8_000, end=1008), 500) == Span("a", 1008, 2000, 7 * SIZE)
    assert make_planner(max_span_tokens=1).next_span(view(8_000), 500) is None  # gives none back


def test_spans_share_the_free_blocks():
    sequences = [view(2_000, name="a"), view(2_000, name="b"), view(2_000, name="c")]
    got = list(make_planner().spans(sequences, free_blocks=20))
    assert [span.request_id for span in got] == ["a", "b"]
    assert sum(ceil_div(span.slots, SIZE) for span in got) <= 20


# -- share of the pool ----------------------------------------------------------------------------


def pressed(free, *sequences, **changes):
    planner = make_planner(0.8, **changes)
    return [span.request_id for span in planner.spans(sequences, free)]


SHORT, MIDDLE, LONG = (
    view(tokens, limit=None, name=name)
    for tokens, name in [(900, "short"), (2_000, "middle"), (4_000, "long")]
)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (200, []),
        (199, ["long"]),
        (2, ["long"]),
        (1, []),  # has room for 160 tokens, less than a span worth compacting
        (0, []),
    ],
)
def test_pool_share_compacts_the_longest_first(free, expected):
    assert pressed(free, SHORT, LONG, MIDDLE)[:1] == expected


def test_pool_share_stops_when_under():
    """LONG gives back 245 - 25 blocks, MIDDLE 120 - 12: taken until the excess is gone."""
    tight = {"num_blocks": 2_000}  # 400 free blocks wanted
    assert pressed(399, SHORT, MIDDLE, LONG, **tight) == ["long"]
    assert pressed(180, SHORT, MIDDLE, LONG, **tight) == ["long"]
    assert pressed(179, SHORT, MIDDLE, LONG, **tight) == ["long", "middle"]
    assert pressed(72, SHORT, MIDDLE, LONG, **tight) == ["long", "middle"]
    assert pressed(71, SHORT, MIDDLE, LONG, **tight) == ["long", "middle", "short"]


def test_pool_share_compacts_those_that_have_queries_for_one_that_waits_for_room():
    """However empty the pool still is; and who has a threshold of its own goes by that."""
    planner = make_planner(0.8)
    views = [SHORT, MIDDLE, LONG, view(700, limit=900, name="own")]
    assert list(planner.spans(views, 900)) == []
    found = [span.request_id for span in planner.spans(views, 900, room_wanted=True)]
    assert found == ["long", "middle", "short"]
    below = view(SIZE + 64 + 255, limit=None)
    assert list(planner.spans([below], 900, room_wanted=True)) == []


def test_pool_share_leaves_short_spans_alone():
    below = view(SIZE + 64 + 255, limit=None)
    assert pressed(100, below) == []
    assert pressed(100, view(SIZE + 64 + 256, limit=None)) == ["a"]
    # With equal bounds that are no multiple of the block there still is a span to take.
    odd = {"min_span_tokens": 250, "max_span_tokens": 250}
    assert pressed(100, view(2_000, limit=None), **odd) == ["a"]


def test_pool_share_and_a_requests_own_threshold():
    own = view(700, limit=512, name="own")
    assert pressed(900, LONG, own) == ["own"]
    assert pressed(100, LONG, own) == ["own", "long"]


def test_pool_share_lets_a_prefill_that_fits_finish():
    assert pressed(150, view(2_000, prompt=3_000, limit=None)) == []
    assert pressed(50, view(2_000, prompt=3_000, limit=None)) == ["a"]


def test_pool_share_always_leaves_room_for_the_next_step():
    """A share of 99 % of a small pool would be noticed only when nothing more can be done."""
    sequence = view(1_500, prompt=9_000, limit=None)
    options = {"num_blocks": 100, "in_flight_tokens": 256}
    planner = make_planner(0.99, **options)
    need = 256 // SIZE + 1 + planner.span_blocks(256, 0.1)
    assert list(planner.spans([sequence], need)) == []
    assert list(planner.spans([sequence], need - 1)) != []


# -- properties of every span ---------------------------------------------------------------------

ratios = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0]) | st.floats(0.01, 1.0)


@given(
    block_size=st.sampled_from([1, 8, 16, 128]),
    computed=st.integers(0, 50_000),
    ended=st.integers(0, 3_000),
    ratio=ratios,
    free=st.integers(0, 2_000),
    recent=st.integers(1, 300),
    longest=st.integers(1, 20_000),
)
def test_every_span_is_legal_and_worth_it(
    block_size, computed, ended, ratio, free, recent, longest
):
    start = ended * block_size
    planner = make_planner(block_size=block_size, recent_tokens=recent, max_span_tokens=longest)
    sequence = SequenceView("a", computed, 0, start, max(0, computed - start), ratio, 512)
    span = planner.next_span(sequence, free)
    if span is None:
        return
    length = span.end - span.start
    assert span.start == start and span.end % block_size == 0 < length
    assert span.end <= computed - recent
    assert length <= max(block_size, longest)
    target = ceil_div(slots_for(length, ratio), block_size)
    assert span.slots == min(length, target * block_size), "whole blocks"
    assert target <= free
    assert target < length // block_size or ratio == 1


# -- a whole life in the smallest pool that startup accepts ---------------------------------------


def live(planner, ratio, prompt, total, chunk, latency, cached=0):
    """Serve one sequence alone: prefill in chunks, then decode; a fit takes ``latency`` steps.

    So many of its first blocks as ``cached`` are in the prefix cache, and as many of them as the
    planner allows are taken, together with the blocks of the first chunk.

    As the scheduler does it: blocks of a finished fit come back, then fits start, then this step's
    tokens get their blocks, or wait while a fit is under way. Running out without one would make
    the sequence preempt itself for ever.
    """
    size, protected = planner.block_size, planner.protected_tokens
    free, computed, held, job, spans = planner.num_blocks, 0, 0, None, []
    hit = min(cached * size, (prompt - 1) // size * size)
    computed = min(hit, planner.longest_hit(prompt, ratio) // size * size)
    for step in range(100_000):
        if computed == total:
            return spans
        if job and step >= job.done:
            spans.append(job.span)
            free += (job.span.end - job.span.start) // size
            job = None
        if job is None and held:
            end = spans[-1].end if spans else protected
            exact = computed - end + protected
            limit = planner.threshold.tokens
            sequence = SequenceView("a", computed, prompt, end, exact, ratio, limit)
            for span in planner.spans([sequence], free):
                assert span.start == end  # no gap, no overlap
                assert span.end <= computed - planner.recent_tokens
                free -= ceil_div(span.slots, size)
                job = SimpleNamespace(span=span, done=step + latency)
        new = min(chunk, prompt - computed) if computed < prompt else 1
        need = ceil_div(computed + new, size) - held
        assert free >= 0
        if need <= free:
            free, held, computed = free - need, held + need, computed + new
        else:
            assert job, f"stuck at {computed} of {total} tokens, {free} free blocks, {need} needed"
    raise AssertionError(f"no progress at {computed} of {total} tokens")


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("chunk", [64, 2048])
@pytest.mark.parametrize("latency", [1, 2, 5], ids=["sync", "async", "sliced"])
@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("threshold", [101, 400, 1024, 0.05, 0.8, 0.99])
def test_peak_tokens_is_enough_alone(threshold, ratio, latency, chunk, block_size):
    for recent, shortest, longest in [(1, 250, 250), (64, 256, 512), (64, 256, 16384)]:
        for prompt, total in [(3_000, 3_050), (64, 1_600)]:
            in_flight = min(latency, 2) * chunk
            planner = make_planner(
                threshold,
                block_size=block_size,
                recent_tokens=recent,
                min_span_tokens=shortest,
                max_span_tokens=longest,
                protected_tokens=block_size,
                in_flight_tokens=in_flight,
            )
            peak = planner.peak_tokens(ratio, total)
            assert peak <= total
            pool = dataclasses.replace(planner, num_blocks=ceil_div(peak, block_size))
            live(pool, ratio, prompt, total, chunk, latency)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("chunk", [64, 2048])
@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("threshold", [101, 1024, 0.05, 0.8, 0.99])
def test_a_prefix_hit_as_long_as_the_pool_leaves_room(threshold, ratio, chunk, block_size):
    """Cached blocks are all taken at once, and the first chunk must fit beside them."""
    served_whole = 0
    for spare in [0, 1, 3, 10, 40]:
        for prompt, total in [(3_000, 3_050), (1_400, 2_600)]:
            planner = make_planner(
                threshold,
                block_size=block_size,
                protected_tokens=block_size,
                in_flight_tokens=2 * chunk,
            )
            blocks = ceil_div(planner.peak_tokens(ratio, total), block_size) + spare
            pool = dataclasses.replace(planner, num_blocks=blocks)
            for cached in (blocks, blocks - 1, blocks // 2):
                live(pool, ratio, prompt, total, chunk, latency=2, cached=cached)
            most = pool.longest_hit(prompt, ratio)
            assert most % block_size == 0 or most == prompt
            served_whole += most == prompt
    assert served_whole, "a sequence that fits beside its compaction keeps its whole hit"


#: Found with an earlier peak_tokens, which counted on longer spans than the planner takes, and
#: with a pool share that left no room for the next chunk.
TIGHT = {
    "segments-shorter-than-threshold": (100, 1, 16384, 0.1, 64, 64, 9_100),
    "segments-cut-by-max-span": (4096, 64, 256, 0.02, 64, 30_000, 30_100),
    "share-without-room-for-a-chunk": (0.8, 64, 16384, 0.1, 2048, 9_000, 9_100),
    "share-of-nearly-everything": (0.95, 1, 256, 0.02, 64, 9_000, 9_100),
}


@pytest.mark.parametrize("case", TIGHT.values(), ids=TIGHT.keys())
def test_a_prompt_far_longer_than_the_pool_is_served(case):
    threshold, recent, longest, ratio, chunk, prompt, total = case
    planner = make_planner(
        threshold, recent_tokens=recent, max_span_tokens=longest, in_flight_tokens=chunk
    )
    peak = planner.peak_tokens(ratio, total)
    assert peak < total
    pool = dataclasses.replace(planner, num_blocks=ceil_div(peak, SIZE))
    spans = live(pool, ratio, prompt, total, chunk, latency=1)
    assert len(spans) > 1
    assert spans[0].start == planner.protected_tokens


def test_segments_are_merged_into_the_limit():
    planner = make_planner(block_size=32, merge_slots=200)
    assert planner.merged_blocks(slots=200, blocks=7) is None, "at the limit"
    assert planner.merged_blocks(slots=201, blocks=7) == 6
    tiny = make_planner(block_size=32, merge_slots=1)
    assert tiny.merged_blocks(slots=64, blocks=2) == 1
    assert tiny.merged_blocks(slots=32, blocks=1) is None, "nothing to win"
    assert make_planner(block_size=32).merged_blocks(slots=10**6, blocks=10**5) is None
