"""The cache of compacted prefixes: segments that other sequences may begin with.

A segment becomes an *entry* when it is committed. Entries are found from the beginning of a text
onwards: the first ones start behind the protected tokens, every other where its parent ends, so
they form a tree, of which a sequence stands on a chain.

An entry's blocks are ordinary cached blocks of vLLM's pool, under keys of their own. So reference
counts, eviction and ``reset_prefix_cache`` are vLLM's: what nobody uses is free, and gone when the
first of its blocks has been handed out and lost its key. The order is that of the last use, with
two exceptions. A block of an entry stands for as much text as many others, and a fit: up to
:data:`KEPT_SHARE` of the pool, no entry is handed out while any other block is free; beyond that,
one that is next goes to the end of the queue as often as it has fewer blocks than its text had. And
the exact blocks of its tokens, which nobody looks for any more, go before all others.

vLLM's hash of the last block of a span covers every token up to there, the cache salt, the LoRA
adapter and the images, so neither of these is asked for here.

vLLM symbols touched: ``v1.core.block_pool.BlockPool`` (called), with its ``free_block_queue``
(``v1.core.kv_cache_utils.FreeKVCacheBlockQueue``: walked from its head, blocks moved);
``KVCacheBlock.set_block_hash`` and ``make_block_hash_with_group_id`` there (called).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)

from vllm_am.engine.messages import Segment

#: Steps after which entries that have lost a block are looked for.
SWEEP_STEPS = 64
#: Of the pool, what entries hold that are handed out after all other blocks: what is evicted under
#: pressure is wanted again under pressure, and then made again.
KEPT_SHARE = 1 / 4


def _digest(*parts: bytes | int) -> BlockHash:
    """SHA-256 of byte strings and whole numbers, whose boundaries count."""
    found = hashlib.sha256()
    for part in parts:
        data = part.to_bytes(8, "big") if isinstance(part, int) else part
        found.update(len(data).to_bytes(8, "big"))
        found.update(data)
    return BlockHash(found.digest())


@dataclass(eq=False)
class Entry:
    """A compacted span that any sequence with the same text up to its end may attend to."""

    key: BlockHash
    parent: Entry | None
    text: BlockHash
    """vLLM's hash of the last block of the span."""
    segment: Segment
    segment_id: int
    """What the workers know its page lists by."""
    blocks: tuple[KVCacheBlock, ...]
    block_keys: tuple[BlockHashWithGroupId, ...]
    before: tuple[KVCacheBlock, ...] = ()
    """Exact blocks in front of the first entry of a text, without which it is of no use."""
    chances: int = 0
    """How often it goes to the end of the queue of free blocks yet, once it has come to its front,
    before it is handed out."""
    named: int = 0
    """Names that it is pinned under, itself or as what others stand on."""
    children: dict[BlockHash, Entry] = field(default_factory=dict)

    def used(self, block_size: int) -> None:
        """Somebody begins with it, or has made it: it is as good as new."""
        text = (self.segment.end - self.segment.start) // block_size
        self.chances = text // len(self.blocks)

    @property
    def alive(self) -> bool:
        """Whether all its blocks, and those of all it stands on, still hold what they held."""
        own = all(b.block_hash == key for b, key in zip(self.blocks, self.block_keys, strict=True))
        return own and (self.parent is None or self.parent.alive)

    @property
    def chain(self) -> Iterator[Entry]:
        """Itself, and all that it stands on."""
        entry: Entry | None = self
        while entry is not None:
            yield entry
            entry = entry.parent


class CompactCache:
    """All entries of one engine.

    Args:
        pool: that their blocks belong to.
        group: of the layers that are compacted.
        block_size: tokens per block.
    """

    def __init__(self, pool: BlockPool, group: int, block_size: int) -> None:
        self._pool = pool
        self._group = group
        self._block_size = block_size
        self._roots: dict[BlockHash, Entry] = {}
        self._replaced: list[Entry] = []
        """Dead ones whose key another one has now."""
        self._by_block: dict[BlockHashWithGroupId, Entry] = {}
        self._steps = 0

    def text(self, hashes: Sequence[BlockHash], end: int) -> BlockHash | None:
        """vLLM's hash of a text up to ``end`` (whole blocks); None where it is not known."""
        index = end // self._pool.hash_block_size - 1
        return hashes[index] if 0 <= index < len(hashes) else None

    def key(
        self, parent: Entry | None, hashes: Sequence[BlockHash], start: int, end: int, slots: int
    ) -> BlockHash | None:
        """What the span [start, end) of a text is filed under; None where its hash is not known.

        Args:
            parent: the entry that ends at ``start``, None for the first of a text.
            hashes: of the text's blocks.
            slots: per head that the span is compacted to.
        """
        text = self.text(hashes, end)
        return None if text is None else self._key(parent, text, start, end, slots)

    @staticmethod
    def _key(parent: Entry | None, text: BlockHash, start: int, end: int, slots: int) -> BlockHash:
        return _digest(b"entry", parent.key if parent else b"", start, end, slots, text)

    def find(
        self,
        parent: Entry | None,
        hashes: Sequence[BlockHash],
        most: int,
        slots_of: Callable[[int], int],
    ) -> Entry | None:
        """The longest living entry that a text has behind ``parent``.

        Args:
            most: tokens that it ends at, at most.
            slots_of: slots per head that a span of so many tokens is to be compacted to.
        """
        best: Entry | None = None
        for entry in self._children(parent).values():
            segment = entry.segment
            if (
                (best.segment.end if best else 0) < segment.end <= most
                and segment.slots == slots_of(segment.end - segment.start)
                and self.text(hashes, segment.end) == entry.text
                and entry.alive
            ):
                best = entry
        return best

    def chain(
        self, hashes: Sequence[BlockHash], most: int, slots_of: Callable[[int], int]
    ) -> tuple[Entry, ...]:
        """The living entries that a text begins with, each where the last one ends."""
        found: list[Entry] = []
        while entry := self.find(found[-1] if found else None, hashes, most, slots_of):
            found.append(entry)
        return tuple(found)

    def publish(
        self,
        parent: Entry | None,
        hashes: Sequence[BlockHash],
        segment: Segment,
        segment_id: int,
        blocks: Sequence[KVCacheBlock],
        before: Sequence[KVCacheBlock],
    ) -> Entry | None:
        """Make an entry of a segment; None where there is such an entry, or its parent is gone.

        Args:
            before: the exact blocks in front of it, where it has no parent.
        """
        text = self.text(hashes, segment.end)
        if text is None or (parent is not None and not parent.alive):
            return None
        key = self._key(parent, text, segment.start, segment.end, segment.slots)
        siblings = self._children(parent)
        if (other := siblings.get(key)) is not None:
            if other.alive:
                return None
            self._replaced.append(other)
        keys = tuple(
            make_block_hash_with_group_id(_digest(b"block", key, i), self._group)
            for i in range(len(blocks))
        )
        entry = Entry(key, parent, text, segment, segment_id, tuple(blocks), keys, tuple(before))
        for block, block_key in zip(blocks, keys, strict=True):
            self._file(block, block_key)
            self._by_block[block_key] = entry
        siblings[key] = entry
        entry.used(self._block_size)
        return entry

    def same(self, parent: Entry | None, hashes: Sequence[BlockHash], segment: Segment) -> Entry:
        """The entry of the same text, span and slots as a segment that was not published for it."""
        key = self.key(parent, hashes, segment.start, segment.end, segment.slots)
        assert key is not None
        return self._children(parent)[key]

    def _children(self, parent: Entry | None) -> dict[BlockHash, Entry]:
        return self._roots if parent is None else parent.children

    def _file(self, block: KVCacheBlock, key: BlockHashWithGroupId, tokens: int = 0) -> None:
        block.set_block_hash(key, num_tokens=tokens)
        self._pool.cached_block_hash_to_block.insert(key, block)

    def exact(self, hashes: Sequence[BlockHash], count: int) -> list[KVCacheBlock] | None:
        """The first ``count`` blocks of a text, if all of them are cached as they are."""
        found = [self._pool.get_cached_block(text, [self._group]) for text in hashes[:count]]
        blocks = [cached[0] for cached in found if cached]
        return blocks if len(blocks) == count else None

    def file_exact(self, hashes: Sequence[BlockHash], blocks: Sequence[KVCacheBlock]) -> None:
        """File a text's first blocks where vLLM finds them."""
        for index, block in enumerate(blocks):
            key = make_block_hash_with_group_id(hashes[index], self._group)
            self._file(block, key, (index + 1) * self._block_size)

    # -- blocks that were computed behind an entry, over what it holds ---------------------------

    def _behind(self, entry: Entry, text: BlockHash) -> BlockHash:
        return _digest(b"behind", entry.key, text)

    def file_behind(
        self, entry: Entry, hashes: Sequence[BlockHash], blocks: Sequence[KVCacheBlock], first: int
    ) -> None:
        """File full blocks where only sequences on the same entry find them.

        Args:
            blocks: of the sequence; those that are filed already stay where they are.
            first: index of the first one in the sequence.
        """
        for index, block in enumerate(blocks, first):
            end = (index + 1) * self._block_size
            text = self.text(hashes, end)
            if text is None:
                return
            if not block.is_null and block.block_hash is None:
                key = make_block_hash_with_group_id(self._behind(entry, text), self._group)
                self._file(block, key, end)

    def blocks_behind(
        self, chain: Sequence[Entry], hashes: Sequence[BlockHash], most: int
    ) -> Iterator[KVCacheBlock]:
        """Cached blocks that a text has behind a chain, up to ``most`` tokens.

        Those computed over all of it, or over fewer of its entries, or over the exact text: the
        more of it was exact, the better.
        """
        start = chain[-1].segment.end
        for end in range(start + self._block_size, most + 1, self._block_size):
            text = self.text(hashes, end)
            if text is None:
                return
            for name in (*(self._behind(entry, text) for entry in reversed(chain)), text):
                if cached := self._pool.get_cached_block(name, [self._group]):
                    yield cached[0]
                    break
            else:
                return

    # -- the order in which free blocks are handed out -------------------------------------------

    def hand_out_first(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Free blocks that are of less use than all others, whatever was used last."""
        for block in blocks:
            self._pool.free_block_queue.remove(block)
        self._pool.free_block_queue.prepend_n(list(blocks))

    def give_chances(self, count: int) -> None:
        """So many blocks are about to be handed out: entries among them go to the end, if they may.

        Each of them once: where there is little else, the longest unused are handed out.
        """
        given: set[int] = set()
        while self._by_block:
            front = islice(self._free_blocks(), count)
            found = (self._by_block.get(b.block_hash) for b in front if b.block_hash is not None)
            # A dead one's blocks are let go.
            due = {e.segment_id: e for e in found if e is not None and e.chances and e.alive}
            if not (fresh := [entry for number, entry in due.items() if number not in given]):
                return
            for entry in fresh:
                if len(self._by_block) > KEPT_SHARE * self._pool.num_gpu_blocks:
                    entry.chances -= 1
                self._hand_out_last(entry)
            given |= due.keys()

    @property
    def filed(self) -> int:
        """Blocks of all entries, whether anybody stands on them or not."""
        return len(self._by_block)

    @property
    def kept(self) -> int:
        """Blocks that are handed out after all others: nobody is admitted on them who can wait."""
        return min(len(self._by_block), int(KEPT_SHARE * self._pool.num_gpu_blocks))

    def _free_blocks(self) -> Iterator[KVCacheBlock]:
        """In the order in which they are handed out."""
        block = self._pool.free_block_queue.fake_free_list_head.next_free_block
        while block is not None and block.next_free_block is not None:
            yield block
            block = block.next_free_block

    def _hand_out_last(self, entry: Entry) -> None:
        """With all that it stands on, which would be missed first."""
        queue = self._pool.free_block_queue
        chain = [block for each in entry.chain for block in (*each.blocks, *each.before)]
        # Each once: an exact block in front may have been handed out since, to one of the entries.
        free = list({block.block_id: block for block in chain if block.ref_cnt == 0}.values())
        for block in free:
            queue.remove(block)
        queue.append_n(free)

    # -- what is there ---------------------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """All that have not been swept, parents first."""
        waiting = [*self._roots.values(), *self._replaced]
        while waiting:
            entry = waiting.pop()
            yield entry
            waiting.extend(entry.children.values())

    def sweep(self, now: bool = False) -> list[int]:
        """Forget what has lost a block, every now and then.

        Nobody uses it: who stands on an entry holds its blocks, and those of all its parents.

        Args:
            now: however long ago the last time was.

        Returns:
            the ids of the segments that are gone.
        """
        self._steps += 1
        if not self._roots or (self._steps < SWEEP_STEPS and not now):
            return []
        self._steps = 0
        dead = [entry for entry in self.entries() if not entry.alive]
        self._replaced.clear()
        ids = {entry.segment_id for entry in dead}
        self._prune(ids)
        for entry in dead:
            for key in entry.block_keys:
                if self._by_block.get(key) is entry:
                    del self._by_block[key]
        # The blocks that a dead entry still has are of no use to anybody.
        self._pool.evict_blocks(
            {
                block.block_id
                for entry in dead
                for block, key in zip(entry.blocks, entry.block_keys, strict=True)
                if block.block_hash == key
            }
        )
        return sorted(ids)

    def _prune(self, ids: set[int]) -> None:
        """Take these entries out of the tree; what stood on them is dead, too."""
        waiting = [self._roots]
        while waiting:
            siblings = waiting.pop()
            for key in [k for k, entry in siblings.items() if entry.segment_id in ids]:
                del siblings[key]
            waiting.extend(entry.children for entry in siblings.values())
