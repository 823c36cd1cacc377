"""The blocks of compactable layers: who owns which, exact and compacted, and the swap at a commit.

vLLM symbol touched: ``v1.core.single_type_kv_cache_manager.FullAttentionManager`` (subclassed,
chosen by the cache spec through vLLM's registry).

The block table of a sequence stays logical: one entry per block of tokens, compacted entries
become vLLM's null block (as with sliding windows), so lengths, slot mapping, positions, prefix
hashes and usage numbers are vLLM's own. The compacted segments live in blocks of their own,
without a hash, owned by one sequence.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_am.engine.messages import Segment
from vllm_am.engine.scheduler.planner import Span

if TYPE_CHECKING:
    from vllm_am.engine.spec import CompactableAttentionSpec


@dataclass
class CompactedBlocks:
    """The compacted part of one sequence, with its blocks."""

    segments: list[Segment] = field(default_factory=list)
    blocks: list[KVCacheBlock] = field(default_factory=list)


class CompactingManager(FullAttentionManager):
    """Full-attention block manager that can swap a span of blocks for a compacted segment."""

    def __init__(self, kv_cache_spec: CompactableAttentionSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # vLLM's factory passes this bound to window-like specs only.
        self.max_admission_blocks_per_request = cdiv(kv_cache_spec.peak_tokens, self.block_size)
        self.compacted: dict[str, CompactedBlocks] = {}
        self.targets: dict[int, list[KVCacheBlock]] = {}

    def segments(self, request_id: str) -> tuple[Segment, ...]:
        state = self.compacted.get(request_id)
        return tuple(state.segments) if state else ()

    def held_blocks(self, request_id: str) -> int:
        """Blocks that the sequence owns or shares, without a running compaction's target."""
        exact = sum(not b.is_null for b in self.req_to_blocks.get(request_id, ()))
        state = self.compacted.get(request_id)
        return exact + (len(state.blocks) if state else 0)

    def reserve_target(self, job_id: int, span: Span) -> tuple[Segment, tuple[int, ...]] | None:
        """Take blocks for the compacted span; None when the pool cannot give them now.

        Taken from the pool itself, not through ``allocate_new_blocks``: those could be zeroed by
        the worker after they were written.

        Returns:
            the target segment and the ids of the source blocks.
        """
        first, last = span.start // self.block_size, span.end // self.block_size
        return self._reserve(job_id, span, self.req_to_blocks[span.request_id][first:last])

    def reserve_merge(self, job_id: int, span: Span) -> tuple[Segment, tuple[int, ...]] | None:
        """The same for a merge: ``span`` is all that was compacted, the source its segments."""
        return self._reserve(job_id, span, self.compacted[span.request_id].blocks)

    def _reserve(
        self, job_id: int, span: Span, source: Sequence[KVCacheBlock]
    ) -> tuple[Segment, tuple[int, ...]] | None:
        count = cdiv(span.slots, self.block_size)
        if count > self.block_pool.get_num_free_blocks():
            return None
        target = self.block_pool.get_new_blocks(count)
        self.targets[job_id] = target
        segment = Segment(span.start, span.end, span.slots, tuple(b.block_id for b in target))
        return segment, tuple(b.block_id for b in source)

    def release_target(self, job_id: int) -> None:
        """The compaction was given up: its blocks go back."""
        self.block_pool.free_blocks(reversed(self.targets.pop(job_id)))

    def commit(self, job_id: int, request_id: str, segment: Segment) -> None:
        """The segment takes the place of its tokens' blocks, which go back to the pool.

        Blocks shared with other sequences only lose this owner. Those with a prefix hash stay
        evictable, so a later prompt can still hit the exact prefix.
        """
        state = self.compacted.setdefault(request_id, CompactedBlocks())
        state.segments.append(segment)
        state.blocks.extend(self.targets.pop(job_id))
        blocks = self.req_to_blocks[request_id]
        first, last = segment.start // self.block_size, segment.end // self.block_size
        exact, blocks[first:last] = blocks[first:last], [self._null_block] * (last - first)
        self.block_pool.free_blocks(reversed(exact))
        # What it computes from now on has seen the segment: vLLM must not file it under the hash of
        # its text, where a request that asks for exact KV would find it.
        self._file_no_more(request_id)

    def _file_no_more(self, request_id: str) -> None:
        """As if all its blocks were cached: none that is still to come becomes others' prefix."""
        self.num_cached_block[request_id] = sys.maxsize

    def commit_merge(self, job_id: int, request_id: str, segment: Segment) -> None:
        """The segment takes the place of all earlier ones, whose blocks go back to the pool."""
        state = self.compacted[request_id]
        merged, state.blocks = state.blocks, self.targets.pop(job_id)
        state.segments = [segment]
        self.block_pool.free_blocks(reversed(merged))

    def share_prefix(self, parent_id: str, request_id: str, tokens: int) -> None:
        """A new sequence begins with the first ``tokens`` (whole blocks) of another one.

        It shares the exact blocks; the compacted ones stay the parent's alone, which outlives it.
        """
        blocks = self.req_to_blocks[parent_id][: tokens // self.block_size]
        self.block_pool.touch([block for block in blocks if not block.is_null])
        self.req_to_blocks[request_id] = blocks
        self._file_no_more(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """vLLM's one exit for finish, abort and preemption: the compacted blocks leave with it."""
        state = self.compacted.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return (state.blocks if state else []) + blocks

    def check(self, other_owners: Iterable[Sequence[KVCacheBlock]] = ()) -> None:
        """Every block's reference count equals the number of its owners (debugging, tests).

        Raises:
            AssertionError: naming the first blocks that do not add up.
        """
        owners: Counter[int] = Counter()
        for blocks in self.req_to_blocks.values():
            owners.update(b.block_id for b in blocks if not b.is_null)
        exclusive = [s.blocks for s in self.compacted.values()] + list(self.targets.values())
        for blocks in [*exclusive, *other_owners]:
            owners.update(b.block_id for b in blocks)
        pool = self.block_pool
        wrong = [
            (b.block_id, b.ref_cnt, owners[b.block_id])
            for b in pool.blocks
            if not b.is_null and b.ref_cnt != owners[b.block_id]
        ]
        if wrong:
            raise AssertionError(f"(block, reference count, owners) differ: {wrong[:5]}")
        if pool.get_num_free_blocks() != pool.num_gpu_blocks - 1 - len(owners):
            raise AssertionError("free blocks and owned blocks do not add up to the pool")
        if any(b.ref_cnt != 1 or b.block_hash is not None for blocks in exclusive for b in blocks):
            raise AssertionError("a compacted block is shared or has a prefix hash")
