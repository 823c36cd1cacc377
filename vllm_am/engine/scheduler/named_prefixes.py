"""Compacted prefixes with a name: they are held, whoever uses them, until somebody drops them.

A name holds all blocks of a chain of entries, and the exact ones in front. So that names never
starve requests, they hold a share of the pool at most, and leave room for the longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_am.engine.prefix_requests import Answer, PrefixRefused, Refusal
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.compact_cache import Entry
from vllm_am.engine.scheduler.planner import Planner


@dataclass(frozen=True)
class NamedPrefix:
    """A chain of entries that is held."""

    name: str
    token_ids: tuple[int, ...]
    """Of the text, up to the end of the last entry."""
    salt: str | None
    ratio: float
    chain: tuple[Entry, ...]
    blocks: tuple[KVCacheBlock, ...]
    """All that it holds: the exact ones in front, then the entries'."""

    def describe(self) -> Answer:
        """For whoever asks, in JSON's types; neither the text nor the salt."""
        spans = [[entry.segment.start, entry.segment.end] for entry in self.chain]
        return {
            "name": self.name,
            "tokens": len(self.token_ids),
            "ratio": self.ratio,
            "spans": spans,
            "slots": sum(entry.segment.slots for entry in self.chain),
            "blocks": len(self.blocks),
            "salted": self.salt is not None,
        }


class NamedPrefixes:
    """All of one engine.

    Args:
        share: of the pool that they may hold at most.
    """

    def __init__(self, blocks: CompactingManager, planner: Planner, share: float) -> None:
        self._blocks = blocks
        self._most = int(share * planner.num_blocks)
        largest = (blocks.max_admission_blocks_per_request or 0) + planner.other_blocks
        self._beside_largest = planner.num_blocks - largest
        self._by_name: dict[str, NamedPrefix] = {}

    def __iter__(self) -> Iterator[NamedPrefix]:
        return iter(self._by_name.values())

    @property
    def held(self) -> list[Sequence[KVCacheBlock]]:
        """The blocks of each; one that several hold is in each of them."""
        return [prefix.blocks for prefix in self._by_name.values()]

    @property
    def block_count(self) -> int:
        """Blocks that are held, each counted once."""
        return len(self._ids())

    def _ids(self) -> set[int]:
        return {b.block_id for blocks in self.held for b in blocks}

    def find(self, name: str) -> NamedPrefix | None:
        """Of that name."""
        return self._by_name.get(name)

    def get(self, name: str) -> NamedPrefix:
        """Raises :class:`PrefixRefused` where there is none."""
        if name not in self._by_name:
            raise PrefixRefused(Refusal.UNKNOWN, f"name={name!r}: there is no such prefix")
        return self._by_name[name]

    def check_free(self, name: str) -> None:
        """Raises :class:`PrefixRefused` where the name is taken."""
        if name in self._by_name:
            raise PrefixRefused(
                Refusal.TAKEN, f"name={name!r}: there is such a prefix; delete it first"
            )

    def check_room(self, more: int, name: str) -> None:
        """Whether names may hold so many blocks more.

        Raises:
            PrefixRefused: saying what would make room.
        """
        total = self.block_count + more
        if total > self._most:
            raise PrefixRefused(
                Refusal.NO_ROOM,
                f"name={name!r}: {more} KV blocks more would make {total} of pinned prefixes, and "
                f"they may hold {self._most}: delete another, or raise pinned_share in "
                "--kv-compaction-config",
            )
        if total > self._beside_largest:
            raise PrefixRefused(
                Refusal.NO_ROOM,
                f"name={name!r}: with {more} KV blocks more of pinned prefixes the pool could not "
                f"hold a request of --max-model-len; {max(0, self._beside_largest)} can be "
                "pinned: delete another, lower --max-model-len, or give the pool more memory",
            )

    def pin(
        self,
        name: str,
        token_ids: Sequence[int],
        salt: str | None,
        ratio: float,
        chain: Sequence[Entry],
        exact: Sequence[KVCacheBlock],
    ) -> NamedPrefix:
        """Hold a chain under a name.

        Args:
            token_ids: of a text that begins with it.
            exact: cached blocks of the text in front of the chain.

        Raises:
            PrefixRefused: the name is taken, or there is no room.
        """
        self.check_free(name)
        blocks = (*exact, *(block for entry in chain for block in entry.blocks))
        held = self._ids()
        self.check_room(sum(block.block_id not in held for block in blocks), name)
        self._blocks.block_pool.touch(blocks)
        for entry in chain:
            entry.named += 1
        text = tuple(token_ids[: chain[-1].segment.end])
        prefix = NamedPrefix(name, text, salt, ratio, tuple(chain), blocks)
        self._by_name[name] = prefix
        return prefix

    def drop(self, name: str) -> NamedPrefix:
        """Its blocks are as free as those of any entry that nobody has named.

        Raises:
            PrefixRefused: there is none.
        """
        prefix = self.get(name)
        del self._by_name[name]
        for entry in prefix.chain:
            entry.named -= 1
        # From the last one on, see ``CompactingManager.pop_blocks_for_free``.
        self._blocks.block_pool.free_blocks(reversed(prefix.blocks))
        return prefix

    def drop_all(self) -> list[str]:
        """The names that there were."""
        names = list(self._by_name)
        for name in names:
            self.drop(name)
        return names


def blocks_in_front(
    blocks: CompactingManager, hashes: Sequence[BlockHash], chain: Sequence[Entry]
) -> list[KVCacheBlock] | None:
    """The exact blocks in front of a chain; None where not all of them are cached."""
    return blocks.cache.exact(hashes, chain[0].segment.start // blocks.block_size)
