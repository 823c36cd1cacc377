"""Which queries are kept as reference queries, and in which slot (context-prefill, algorithm §2.1).

The queries themselves live on the workers, in a tensor of ``capacity`` token positions per layer.
The scheduler decides on the host which positions go where, from token positions and block ids
alone: no device synchronisation, the same decision for every layer, head, TP rank and PP stage.

A sample belongs to the *physical block* that holds its token's KV. So it lives exactly as long as
that KV: a prefix-cache hit brings the queries of the cached prefix along, and a block that is
handed out again forgets them. The samples of a reference pass outlive its blocks: they belong to
the pass, until it is told to be forgotten; so do those of a sequence's compacted tokens, where its
segments may be merged one day.

A full pool gives samples up in the order of their use (:class:`Use`). A sequence gets its whole
sample or leaves the place to others: a fit to a part of it loses most of what is asked later, and
shows no error. Only those that cannot be held otherwise share what there is. Imports no vLLM.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from enum import IntEnum

import numpy as np

#: A physical block, or (id of a reference pass, index of the block in its sequence), or (id of a
#: sequence, 0) for what is kept of its compacted tokens.
Owner = int | tuple[str, int]


class Use(IntEnum):
    """What the samples of a sequence are going to be of use for, from the least to the most."""

    PERHAPS = 0
    """It will not be compacted; another may begin with its blocks that will."""
    OTHERS = 1
    """It is compacted for others that begin with the same text."""
    OWN = 2
    """It is compacted for its own sake."""
    MUST = 3
    """The pool could not hold it otherwise."""


_MIX_1 = np.uint64(0x9E3779B97F4A7C15)
_MIX_2 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_3 = np.uint64(0x94D049BB133111EB)


#: Offsets of no token, and of the first.
_NONE, _FIRST = np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64)


def position_priority(positions: np.ndarray) -> np.ndarray:
    """A fixed pseudo-random number in [0, 1) for every token position (splitmix64 finaliser).

    Thresholding it draws a uniform sample of the positions that needs no state, and that is the
    same when a preempted request is computed again.
    """
    with np.errstate(over="ignore"):
        x = positions.astype(np.uint64) * _MIX_1 + _MIX_1
        x = (x ^ (x >> np.uint64(30))) * _MIX_2
        x = (x ^ (x >> np.uint64(27))) * _MIX_3
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)


class QueryPool:
    """Book-keeping of sampled query positions by owner.

    Args:
        capacity: token positions that the workers' tensors can hold.
        block_size: tokens per KV block.
        max_positions: longest sequence (``max_model_len``).
        is_live: whether a block id is in use by a request; samples of other blocks (cached
            prefixes nobody uses now) are given up first, oldest first, when the pool is full.
            Then every owner gives up half of its samples.
    """

    def __init__(
        self, capacity: int, block_size: int, max_positions: int, is_live: Callable[[int], bool]
    ) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self._priority = position_priority(np.arange(max_positions, dtype=np.int64))
        self._is_live = is_live
        self.positions = np.zeros(capacity, dtype=np.int64)
        """Position in its sequence of the token in each slot."""
        self._free = list(range(capacity - 1, -1, -1))
        self._samples: OrderedDict[Owner, dict[int, int]] = OrderedDict()  # owner -> {offset: slot}
        self._use: dict[Owner, Use] = {}
        """Of those whose samples are not ``MUST``."""
        self._uses = [0] * capacity  # of each slot: owners that have it, and fits that read it
        self._share = 1.0  # of what is asked for in this step
        self._fresh: set[int] = set()  # slots that are written in this step
        self._held: Counter[int] = Counter()  # slots that fits under way read, by number of fits

    @property
    def used(self) -> int:
        """Positions held at present."""
        return self.capacity - len(self._free)

    def begin_step(self, wanted: float = 0) -> None:
        """A slot chosen from here on is written once in this step: nobody else may take it.

        Args:
            wanted: positions that those together ask for in this step that must have some. Where
                the pool cannot hold them beside those that they have, all of these and of those are
                thinned alike: first come, first served would leave the last one without any.
        """
        self._fresh.clear()
        self._share = 1.0
        if wanted > len(self._free):
            live = [s for owner, s in self._samples.items() if self._stays(owner, Use.MUST)]
            others = len(
                {slot for samples in live for slot in samples.values()} - self._held.keys()
            )
            self._share = min(1.0, (self.capacity - len(self._held)) / (wanted + others))

    def room(self, use: Use) -> int:
        """Slots that are free, or would be given up for such a use."""
        gone = [s for owner, s in self._samples.items() if not self._stays(owner, use)]
        slots = {slot for samples in gone for slot in samples.values()}
        return len(self._free) + len(slots - self._held.keys())

    def promote(self, owners: Iterable[Owner], use: Use) -> None:
        """A sequence has begun with these blocks: their samples are of use to it."""
        for owner in owners:
            if self._use.get(owner, Use.MUST) < use:
                self._set_use(owner, use)

    def _set_use(self, owner: Owner, use: Use) -> None:
        if use is Use.MUST:
            self._use.pop(owner, None)
        else:
            self._use[owner] = use

    def _stays(self, owner: Owner, use: Use) -> bool:
        """Whether its samples are not given up for such a use."""
        return self._is_in_use(owner) and self._use.get(owner, Use.MUST) >= use

    def _is_in_use(self, owner: Owner) -> bool:
        return not isinstance(owner, int) or self._is_live(owner)

    def forget(self, owners: Iterable[Owner]) -> None:
        """These blocks were handed out anew, or these passes have served: their samples go."""
        for owner in owners:
            self._forget(owner)

    def _forget(self, owner: Owner) -> int:
        """How many slots became free."""
        self._use.pop(owner, None)
        return self._give_back(self._samples.pop(owner, {}).values())

    def hold(self, slots: np.ndarray) -> None:
        """A fit reads these slots in several steps: none is handed out before :meth:`release`."""
        self._held.update(slots.tolist())
        for slot in slots.tolist():
            self._uses[slot] += 1

    def release(self, slots: np.ndarray) -> None:
        """The fit is over."""
        self._held -= Counter(slots.tolist())
        self._give_back(slots.tolist())

    def can_hold(self, count: int) -> bool:
        """Whether half of the pool stays free of fits, for what is being read meanwhile.

        A fit by itself may hold everything: it cannot wait for another to end.
        """
        return not self._held or len(self._held) + count <= self.capacity // 2

    def keep(self, block_ids: Iterable[int], owner: Owner, most: int) -> None:
        """What was sampled in these blocks gets another owner, that outlives them.

        Args:
            owner: who may own some already; what it owns is thinned evenly.
            most: positions that it owns then at most.
        """
        kept = self._samples.setdefault(owner, {})
        for block_id in block_ids:
            for slot in self._samples.get(block_id, {}).values():
                kept[int(self.positions[slot])] = slot
                self._uses[slot] += 1
        positions = sorted(kept)
        chosen = np.linspace(0, len(positions) - 1, min(most, len(positions))).round().astype(int)
        dropped = set(range(len(positions))) - set(chosen.tolist())
        self._give_back([kept.pop(positions[index]) for index in sorted(dropped)])

    def _give_back(self, slots: Iterable[int]) -> int:
        """One use less of each of them; how many became free."""
        before = len(self._free)
        for slot in slots:
            self._uses[slot] -= 1
            if not self._uses[slot]:
                self._free.append(slot)
        return len(self._free) - before

    def sample(
        self,
        owner_of: Callable[[int], Owner],
        start: int,
        count: int,
        rate: float,
        always_from: int,
        use: Use = Use.MUST,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose among the token positions [start, start + count) of a sequence.

        Args:
            owner_of: from logical block index to the block that holds it, or to the pass it is of.
            start, count: the tokens computed in this step.
            rate: probability that a position is kept.
            always_from: positions from here on are kept in any case (end of the prompt) where
                the pool is not full.
            use: others before those of more use: their slots may be given up for these.

        Returns:
            offsets from ``start`` and slots, both int64 [n]; n is less than wanted when the pool
            is full of live samples.
        """
        if count == 1 and self._free and start < len(self._priority):
            # Decoding: numpy takes longer over one number than this.
            share = (1.0 if start >= always_from else rate) * self._share_of(use)
            if self._priority[start] >= share:
                return _NONE, _NONE
            slot = self._slot(owner_of, start, use)
            self.positions[slot] = start
            self._fresh.add(slot)
            return _FIRST, np.array([slot], dtype=np.int64)
        rates = np.full(count, rate)
        rates[max(0, always_from - start) :] = 1.0
        rates *= self._share_of(use)
        wanted = start + np.flatnonzero(self._priority[start : start + count] < rates)
        if len(wanted) > len(self._free):
            self._evict(len(wanted) - len(self._free), use)
            if len(wanted) > len(self._free):
                # Thin evenly rather than keep only the beginning.
                index = np.linspace(0, len(wanted) - 1, len(self._free)).astype(np.int64)
                wanted = wanted[np.unique(index)] if len(self._free) else wanted[:0]
        slots = np.empty(len(wanted), dtype=np.int64)
        for i, position in enumerate(wanted.tolist()):
            slots[i] = self._slot(owner_of, position, use)
        self.positions[slots] = wanted
        self._fresh.update(slots.tolist())
        return wanted - start, slots

    def _share_of(self, use: Use) -> float:
        """Of what a sequence asks for in this step, what it gets where the pool is full."""
        return self._share if use is Use.MUST else 1.0

    def _slot(self, owner_of: Callable[[int], Owner], position: int, use: Use) -> int:
        """The slot of a position, a free one if it has none yet."""
        block, offset = divmod(position, self.block_size)
        owner = owner_of(block)
        if owner not in self._samples:
            self._samples[owner] = {}
            self._set_use(owner, use)
        samples = self._samples[owner]
        slot = samples.get(offset)
        if slot is None:
            slot = samples[offset] = self._free.pop()
            self._uses[slot] = 1
        return slot

    def is_regular(self, slots: np.ndarray, rate: float) -> np.ndarray:
        """bool [n]: which of them a sample of this rate has, whatever else is always kept."""
        return self._priority[self.positions[slots]] < rate

    def regular(self, start: int, end: int, rate: float) -> int:
        """How many positions in [start, end) a sample of this rate has."""
        return int((self._priority[start:end] < rate).sum())

    def count(self, owner: Owner) -> int:
        """Samples of an owner."""
        return len(self._samples.get(owner, ()))

    def slots(self, owners: Iterable[Owner]) -> np.ndarray:
        """Slots of all samples of these owners, in position order; int64 [n]."""
        found: list[int] = []
        for owner in owners:
            if samples := self._samples.get(owner):
                self._samples.move_to_end(owner)
                found.extend(samples[offset] for offset in sorted(samples))
        return np.asarray(found, dtype=np.int64)

    def _evict(self, count: int, use: Use) -> None:
        """Free at least ``count`` slots, if that leaves every owner of no less use a sample."""
        for owner in list(self._samples):
            if count <= 0:
                return
            if not self._stays(owner, use):
                count -= self._forget(owner)
        if use is not Use.MUST:
            return
        while count > 0:
            thinned = False
            for samples in self._samples.values():
                for offset in sorted(samples)[1::2]:
                    slot = samples[offset]
                    if slot not in self._fresh and slot not in self._held:
                        count -= self._give_back([samples.pop(offset)])
                        thinned = True
            if not thinned:
                return

    def named_owners(self) -> set[str]:
        """Reference passes and sequences that samples belong to by name (debugging, tests)."""
        return {owner[0] for owner in self._samples if not isinstance(owner, int)}

    def check(self) -> None:
        """Every slot is free, or used as often as is counted (debugging, tests)."""
        used = Counter(slot for samples in self._samples.values() for slot in samples.values())
        used.update(self._held)
        counted = self._uses == [used[slot] for slot in range(self.capacity)]
        if not counted or sorted([*+used, *self._free]) != list(range(self.capacity)):
            raise AssertionError("query pool slots leaked or were handed out twice")
