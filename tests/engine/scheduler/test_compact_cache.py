"""The order in which the blocks of compacted prefixes are handed out, on vLLM's own pool."""

from __future__ import annotations

import pytest

from vllm_am.engine.messages import Segment


@pytest.fixture
def pool(plugin):
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(10, enable_caching=True, hash_block_size=16)


def free_ids(pool):
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


def test_a_chain_goes_last_each_block_once(pool):
    """Also where an exact block in front of it has been handed out since, to one of its entries."""
    from vllm_am.engine.scheduler.compact_cache import CompactCache

    cache = CompactCache(pool, 0, 16)
    blocks = pool.get_new_blocks(4)
    in_front, first, second, other = blocks
    hashes = [bytes([i]) * 32 for i in range(4)]
    parent = cache.publish(None, hashes, Segment(16, 32, 16, ()), 0, [first], [in_front, second])
    child = cache.publish(parent, hashes, Segment(32, 48, 16, ()), 1, [second], [])
    assert parent is not None and child is not None
    pool.free_blocks(blocks)
    before = free_ids(pool)
    cache._hand_out_last(child)
    after = free_ids(pool)
    assert sorted(after) == sorted(before)
    chain = {in_front.block_id, first.block_id, second.block_id}
    assert set(after[-3:]) == chain
    # What the others stand on is missed first, so it goes last.
    assert after.index(second.block_id) < after.index(first.block_id)
    assert other.block_id not in after[-3:]


def test_an_entry_that_is_next_gets_its_chances(pool, monkeypatch):
    """As many as it has fewer blocks than its text had, where entries hold much of the pool."""
    from vllm_am.engine.scheduler import compact_cache
    from vllm_am.engine.scheduler.compact_cache import CompactCache

    cache = CompactCache(pool, 0, 16)
    (block,) = pool.get_new_blocks(1)
    hashes = [bytes([i]) * 32 for i in range(8)]
    entry = cache.publish(None, hashes, Segment(16, 96, 16, ()), 0, [block], [])
    assert entry is not None
    pool.free_blocks([block])
    for _ in range(9):
        pool.free_block_queue.remove(block)
        pool.free_block_queue.prepend_n([block])
        cache.give_chances(1)
        assert free_ids(pool)[-1] == block.block_id, "few are always handed out last"
    monkeypatch.setattr(compact_cache, "KEPT_SHARE", 0)
    for left in range(5, 0, -1):
        pool.free_block_queue.remove(block)
        pool.free_block_queue.prepend_n([block])
        assert entry.chances == left
        cache.give_chances(1)
        assert free_ids(pool)[-1] == block.block_id
    pool.free_block_queue.remove(block)
    pool.free_block_queue.prepend_n([block])
    cache.give_chances(1)
    assert free_ids(pool)[0] == block.block_id
