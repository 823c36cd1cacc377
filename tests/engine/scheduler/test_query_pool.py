"""Which queries are kept, and that their slots never leak, double, or vanish while in use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_am.engine.scheduler.query_pool import QueryPool, Use, position_priority

NEVER = 1 << 30


def make_pool(capacity=64, block_size=4, max_positions=4096, live=lambda block: True) -> QueryPool:
    return QueryPool(capacity, block_size, max_positions, live)


def sample(pool, start, count, rate=1.0, always_from=NEVER, block_of=lambda index: index):
    offsets, slots = pool.sample(block_of, start, count, rate, always_from)
    assert offsets.dtype == slots.dtype == np.int64 and offsets.shape == slots.shape
    return offsets.tolist(), slots.tolist()


# -- which positions ------------------------------------------------------------------------------


def test_priorities_are_uniform():
    priority = position_priority(np.arange(65536))
    assert priority.min() >= 0 and priority.max() < 1
    assert len(np.unique(priority)) == len(priority)
    counts, _ = np.histogram(priority, bins=32, range=(0, 1))
    chi2 = ((counts - 2048) ** 2 / 2048).sum()
    assert chi2 < 60  # 31 degrees of freedom: P(> 60) = 0.1 %, and the values are fixed


@pytest.mark.parametrize("rate", [1 / 32, 1 / 8, 1 / 2])
def test_sampling_covers_the_whole_span_at_the_rate(rate):
    pool = make_pool(capacity=65536, max_positions=65536)
    offsets, _ = sample(pool, 0, 65536, rate)
    per_eighth, _ = np.histogram(offsets, bins=8, range=(0, 65536))
    expected = rate * 8192
    assert np.all(np.abs(per_eighth - expected) < 4 * np.sqrt(expected))


def test_sampling_depends_on_the_position_alone():
    """A preempted request that is computed again, in other chunks, keeps the same queries."""
    whole, _ = sample(make_pool(capacity=4096), 0, 1000, rate=0.2)
    pool, chunked = make_pool(capacity=4096), []
    for start, count in [(0, 1), (1, 499), (500, 13), (513, 487)]:
        offsets, _ = sample(pool, start, count, rate=0.2, block_of=lambda index: 1000 - index)
        chunked += [start + offset for offset in offsets]
    assert chunked == whole
    assert 100 < len(whole) < 300


@pytest.mark.parametrize(("rate", "always_from"), [(0.2, NEVER), (1.0, NEVER), (0.2, 900)])
def test_one_at_a_time_is_all_at_once(rate, always_from):
    """And nothing behind the longest sequence."""
    expected, _ = sample(make_pool(capacity=4096), 0, 1000, rate, always_from)
    pool = make_pool(capacity=4096, max_positions=1000)
    assert [i for i in range(1001) if sample(pool, i, 1, rate, always_from)[0]] == expected
    pool.check()


def test_always_from_keeps_the_end_of_the_prompt():
    offsets, _ = sample(make_pool(), 100, 20, rate=0.0, always_from=113)
    assert offsets == [13, 14, 15, 16, 17, 18, 19]
    assert sample(make_pool(), 100, 20, rate=0.0, always_from=0)[0] == list(range(20))
    assert sample(make_pool(), 100, 20, rate=0.0, always_from=120)[0] == []


# -- where they are kept --------------------------------------------------------------------------


def test_slots_are_found_by_block_in_position_order():
    pool = make_pool(block_size=4)
    blocks = [9, 2, 5]
    _, late = sample(pool, 6, 4, block_of=blocks.__getitem__)  # blocks out of order
    _, early = sample(pool, 0, 6, block_of=blocks.__getitem__)
    assert pool.slots(blocks).tolist() == early + late
    assert pool.slots([2]).tolist() == early[4:] + late[:2]
    assert pool.slots([7]).tolist() == []
    assert pool.used == 10


def test_samples_of_a_pass_outlive_blocks_and_go_when_told():
    """They belong to the pass: reused blocks do not forget them, a full pool does not drop them."""
    pool = make_pool(capacity=16, block_size=4, live=lambda block: False)
    _, of_pass = sample(pool, 4, 8, block_of=lambda index: ("p", index))
    sample(pool, 0, 8)
    pool.begin_step()
    pool.forget(range(8))
    assert pool.slots([("p", 1), ("p", 2)]).tolist() == of_pass and pool.named_owners() == {"p"}
    pool.begin_step()
    sample(pool, 0, 8)
    pool.begin_step()
    sample(pool, 8, 8)  # full: the dead blocks give theirs up, the pass does not
    assert pool.slots([("p", 1), ("p", 2)]).tolist() == of_pass
    pool.forget([("p", 1), ("p", 2)])
    assert pool.named_owners() == set() and pool.used == 8
    pool.check()


def test_kept_samples_outlive_their_blocks():
    """A sequence keeps them beside the block, whose cached prefix serves others; evenly thinned."""
    pool = make_pool(capacity=16, block_size=4, live=lambda block: False)
    _, slots = sample(pool, 0, 8)
    pool.keep([0, 1], ("s", 0), most=8)
    assert pool.slots([("s", 0)]).tolist() == slots == pool.slots([0, 1]).tolist()
    assert pool.used == 8, "no copies"
    pool.check()
    pool.forget([0])
    assert pool.slots([("s", 0)]).tolist() == slots and pool.used == 8
    _, late = sample(pool, 8, 4)
    pool.keep([2], ("s", 0), most=6)
    kept = pool.positions[pool.slots([("s", 0)])].tolist()
    assert len(kept) == 6 and kept[0] == 0 and kept[-1] == 11 and kept == sorted(kept)
    assert pool.slots([2]).tolist() == late, "the block's own are not thinned"
    pool.check()
    pool.forget([("s", 0)])
    assert pool.used == 8 and pool.named_owners() == set()
    pool.forget([1, 2])
    assert pool.used == 0
    pool.check()


def test_slots_that_a_fit_reads_are_nobody_elses_until_it_is_over():
    """A fit reads its queries in several steps, whatever happens to their blocks meanwhile."""
    pool = make_pool(capacity=16, block_size=4, live=lambda block: block < 4)
    _, read = sample(pool, 0, 8)
    slots = np.asarray(read)
    assert pool.can_hold(16), "one fit by itself may hold everything"
    pool.hold(slots)
    assert not pool.can_hold(1), "half of the pool is left to what is being read"
    pool.hold(slots[:2])  # another fit, of a sequence on the same prefix
    pool.begin_step()
    _, others = sample(pool, 8, 8)
    pool.begin_step()
    _, more = sample(pool, 16, 8)  # a full pool thins what no fit reads
    assert more and not set(others + more) & set(read)
    assert pool.slots([0, 1]).tolist() == read
    pool.forget([0, 1])  # their blocks were handed out anew
    pool.begin_step()
    _, later = sample(pool, 24, 8)
    assert not set(later) & set(read)
    pool.check()
    pool.release(slots)
    pool.begin_step()
    pool.forget(range(64))
    assert pool.used == 2, "the other fit still reads its two"
    pool.release(slots[:2])
    assert pool.used == 0
    pool.check()


def test_a_full_pool_is_shared_alike():
    """By those of one step, and with those that are there: nobody is left without queries."""
    pool = make_pool(capacity=64, block_size=16)
    pool.begin_step(2 * 64)
    first, second = (
        sample(pool, 0, 64, block_of=lambda index, at=at: at + index)[0] for at in (0, 10)
    )
    assert 20 <= len(first) <= 40 and 20 <= len(second) <= 40
    pool.begin_step(2 * 64)
    for at in (20, 30):
        assert 8 <= len(sample(pool, 0, 64, block_of=lambda index, at=at: at + index)[0]) <= 32
    held = [len(pool.slots(range(at, at + 4))) for at in (0, 10, 20, 30)]
    assert min(held) >= 8 and sum(held) <= 64
    pool.begin_step(0)
    assert len(sample(pool, 64, 1, block_of=lambda index: 40)[0]) == 1, "there is room for one"
    pool.check()


def test_resampled_position_reuses_its_slot():
    pool = make_pool()
    _, first = sample(pool, 0, 8)
    _, again = sample(pool, 0, 8)
    assert again == first and pool.used == 8


def test_block_handed_out_again_forgets():
    pool = make_pool(block_size=4)
    sample(pool, 0, 8)
    pool.forget([0, 0, 77])
    pool.check()
    assert pool.slots([0]).tolist() == [] and len(pool.slots([1])) == 4 and pool.used == 4


def test_full_pool_gives_up_unused_blocks_oldest_first():
    live = {3}
    pool = make_pool(capacity=12, block_size=4, live=live.__contains__)
    sample(pool, 0, 12, block_of=[3, 1, 2].__getitem__)
    pool.slots([1])  # used just now: 2 is the oldest of the unused
    sample(pool, 0, 4, block_of=lambda index: 8)
    assert [len(pool.slots([block])) for block in (3, 1, 2, 8)] == [4, 4, 0, 4]


def test_more_than_the_pool_holds_is_thinned_evenly():
    pool = make_pool(capacity=10, block_size=4)
    offsets, slots = sample(pool, 0, 1000)
    assert len(slots) == 10 == pool.used
    assert offsets[0] == 0 and offsets[-1] == 999
    gaps = np.diff(offsets)
    assert gaps.max() - gaps.min() <= 1


def test_full_pool_of_live_samples_halves_every_block():
    pool = make_pool(capacity=16, block_size=4)
    _, old = sample(pool, 0, 16)
    pool.begin_step()
    _, new = sample(pool, 16, 3)
    assert len(new) == 3
    assert [pool.slots([block]).tolist() for block in range(4)] == [
        [old[i], old[i + 2]] for i in (0, 4, 8, 12)
    ]
    pool.check()


def test_slots_of_this_step_are_not_handed_out_again():
    """The workers write all of a step's samples at once: two in one slot would race."""
    pool = make_pool(capacity=8, block_size=4)
    _, first = sample(pool, 0, 8)
    assert sample(pool, 8, 4) == ([], [])
    assert pool.slots(range(3)).tolist() == first
    pool.begin_step()
    _, second = sample(pool, 8, 4)
    assert len(second) == 4


def test_check_sees_leaks_and_doubles():
    leaking, doubling = make_pool(), make_pool()
    leaking._free.pop()
    doubling._free[0] = doubling._free[1]
    for broken in (leaking, doubling):
        with pytest.raises(AssertionError, match="leaked or were handed out twice"):
            broken.check()


class QueryPoolLife(RuleBasedStateMachine):
    """Any order of calls, against a plain record of which block holds which samples."""

    BLOCK_SIZE, BLOCKS, CAPACITY = 4, 8, 20

    def __init__(self):
        super().__init__()
        self.live: set[int] = set()
        self.pool = make_pool(self.CAPACITY, self.BLOCK_SIZE, 64, self.live.__contains__)
        self.held: dict[int, dict[int, int]] = {}
        self.written: dict[int, tuple[int, int]] = {}  # in this step: slot -> (block, offset)

    blocks = st.sets(st.integers(0, BLOCKS - 1), max_size=3)

    @rule(freed=blocks, handed_out=blocks)
    def next_step(self, freed, handed_out):
        """As in the scheduler: blocks change hands before anything is sampled."""
        self.pool.begin_step()
        self.written.clear()
        self.live -= freed
        self.live |= handed_out
        self.pool.forget(handed_out)
        for block in handed_out:
            self.held.pop(block, None)
            assert self.pool.slots([block]).tolist() == []

    @rule(
        table=st.permutations(range(BLOCKS)),
        start=st.integers(0, 31),
        count=st.integers(0, 31),
        rate=st.sampled_from([0.0, 0.3, 1.0]),
        always_from=st.integers(0, 40),
    )
    def sample(self, table, start, count, rate, always_from):
        count = min(count, self.BLOCKS * self.BLOCK_SIZE - start)
        # The blocks that a request computes in are its own.
        first, end = start // self.BLOCK_SIZE, -(-(start + count) // self.BLOCK_SIZE)
        self.live.update(table[first:end])
        offsets, slots = sample(
            self.pool, start, count, rate, always_from, block_of=table.__getitem__
        )
        assert offsets == sorted(set(offsets)) and all(0 <= offset < count for offset in offsets)
        for offset, slot in zip(offsets, slots, strict=True):
            index, within = divmod(start + offset, self.BLOCK_SIZE)
            place = (table[index], within)
            assert self.written.setdefault(slot, place) == place  # one writer per slot and step
            self.held.setdefault(table[index], {})[within] = slot

    @invariant()
    def nothing_leaks_and_live_blocks_keep_samples(self):
        self.pool.check()
        for slot, (block, within) in self.written.items():
            assert self.pool._samples[block][within] == slot
        for block, known in list(self.held.items()):
            got = dict(self.pool._samples.get(block, {}))
            assert got.items() <= known.items()  # thinned, never moved
            assert got or block not in self.live
            self.held[block] = got
            if not got:
                del self.held[block]  # evicted, as a block nobody uses may be


TestQueryPoolLife = QueryPoolLife.TestCase
TestQueryPoolLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# -- by use ---------------------------------------------------------------------------------------


def take(pool, block, use, count=4):
    """Sample ``count`` tokens of a block of four, all of them."""
    pool.begin_step()
    return len(pool.sample(lambda index: block + index, 0, count, 1.0, NEVER, use)[1])


def test_samples_of_less_use_make_way():
    """And nobody's of as much: who comes later gets what is left."""
    pool = make_pool(capacity=12)
    for block, use in ((1, Use.PERHAPS), (2, Use.OTHERS), (3, Use.OWN)):
        assert take(pool, block, use) == 4
    assert [pool.room(use) for use in Use] == [0, 4, 8, 12]
    assert take(pool, 4, Use.OWN) == 4, "in place of what is perhaps of use"
    assert [pool.count(block) for block in (1, 2, 3, 4)] == [0, 4, 4, 4]
    assert take(pool, 5, Use.OTHERS) == 0 and take(pool, 6, Use.PERHAPS) == 0
    assert take(pool, 7, Use.OWN) == 4
    assert [pool.count(block) for block in (2, 3, 4, 7)] == [0, 4, 4, 4]
    assert take(pool, 8, Use.OWN) == 0
    pool.check()


def test_samples_that_somebody_begins_with_are_of_use_to_it():
    pool = make_pool(capacity=8)
    take(pool, 1, Use.PERHAPS)
    take(pool, 2, Use.PERHAPS)
    pool.promote([1], Use.OWN)
    pool.promote([1], Use.PERHAPS)  # never to less
    assert take(pool, 3, Use.OTHERS) == 4
    assert [pool.count(block) for block in (1, 2, 3)] == [4, 0, 4]
    pool.forget([1])
    assert take(pool, 1, Use.PERHAPS) == 4, "handed out anew"
    assert take(pool, 4, Use.OTHERS) == 4
    assert pool.count(1) == 0
    pool.check()


def test_those_that_must_have_some_share():
    """In place of all others first, then alike among them."""
    pool = make_pool(capacity=12)
    take(pool, 1, Use.OWN)
    take(pool, 2, Use.MUST)
    take(pool, 3, Use.MUST)
    assert take(pool, 4, Use.MUST) == 4
    assert pool.count(1) == 0
    pool.begin_step(wanted=4)
    assert len(pool.sample(lambda index: 5, 0, 4, 1.0, NEVER, Use.MUST)[1]) >= 1
    assert all(pool.count(block) >= 1 for block in (2, 3, 4, 5))
    pool.check()


def test_regular_positions_are_counted():
    pool = make_pool(capacity=4096)
    assert pool.regular(0, 1000, 1.0) == 1000
    offsets, _ = pool.sample(lambda index: index, 100, 700, 0.3, NEVER)
    assert pool.regular(100, 800, 0.3) == len(offsets)
