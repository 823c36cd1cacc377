"""Which text recent prompts had in common: counts of the hashes of their blocks, and no KV.

vLLM's prefix cache would tell, too, but only as long as the blocks last, and these are what
compaction gives back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Blocks that are remembered, at 10 bytes each; of blocks of 32, 8 million tokens.
CAPACITY = 1 << 18
#: Of a hash; any two blocks are confused with a probability of 2^-64.
_NAME_BYTES = 8


class RecentPrompts:
    """How many prompts had each block, in a table of fixed size: the last one in a place stays.

    A block's hash covers all tokens in front of it (and cache salt, LoRA adapter, images), so that
    to have a block in common is to have the whole prefix in common.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._names = np.zeros(capacity, np.uint64)
        self._counts = np.zeros(capacity, np.uint16)

    def add(self, hashes: Sequence[bytes]) -> None:
        """Count a prompt.

        Args:
            hashes: of its full blocks, each of 8 bytes at least.
        """
        names, places = self._places(hashes)
        known = np.where(self._names[places] == names, self._counts[places], 0)
        self._names[places] = names
        self._counts[places] = np.minimum(known, np.iinfo(np.uint16).max - 1) + 1

    def common(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks of a prompt after which another one went on differently, or ended.

        The last such place, which is where a text ends that is asked about again and again. Where
        there is none, all blocks if another prompt had them, else 0.

        Args:
            hashes: of the prompt's full blocks.
        """
        names, places = self._places(hashes)
        counts = np.where(self._names[places] == names, self._counts[places], 0).astype(np.int64)
        # Whoever has a block has those in front of it; a count that is lower there has lost its
        # place to another block. And one prompt has them all: this one.
        counts = np.maximum(np.maximum.accumulate(counts[::-1])[::-1], 1)
        drops = np.flatnonzero(counts[1:] < counts[:-1])
        if len(drops):
            return int(drops[-1]) + 1
        return len(counts) if len(counts) and counts[-1] > 1 else 0

    def _places(self, hashes: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        names = np.frombuffer(b"".join(h[:_NAME_BYTES] for h in hashes), np.uint64)
        return names, names % np.uint64(len(self._names))
