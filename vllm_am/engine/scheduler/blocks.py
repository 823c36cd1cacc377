"""The blocks of compactable layers: who owns which, exact and compacted, and the swap at a commit.

vLLM symbol touched: ``v1.core.single_type_kv_cache_manager.FullAttentionManager`` (subclassed,
chosen by the cache spec through vLLM's registry).

The block table of a sequence stays logical: one entry per block of tokens, compacted entries
become vLLM's null block (as with sliding windows), so lengths, slot mapping, positions, prefix
hashes and usage numbers are vLLM's own. The compacted segments live in blocks of their own: without
a hash and owned by one sequence, or published (compact_cache.py) and shared by all that stand on
them.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    MambaManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request

from vllm_am.engine.messages import Attachment, Segment
from vllm_am.engine.scheduler.compact_cache import CompactCache, Entry
from vllm_am.engine.scheduler.planner import Span

if TYPE_CHECKING:
    from vllm_am.engine.spec import CompactableAttentionSpec


@dataclass
class CompactedBlocks:
    """The compacted part of one sequence, with its blocks."""

    segments: list[Segment] = field(default_factory=list)
    blocks: list[KVCacheBlock] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    """Those of the segments, from the first on, that are published."""

    @property
    def shared(self) -> bool:
        """Whether all of it is published, so that others may stand on the same."""
        return len(self.entries) == len(self.segments)

    @property
    def tip(self) -> Entry | None:
        """The last entry that it stands on; None where nothing of it is published."""
        return self.entries[-1] if self.entries else None

    def add(self, entry: Entry) -> None:
        """The sequence holds an entry's blocks from now on."""
        self.segments.append(entry.segment)
        self.blocks.extend(entry.blocks)
        self.entries.append(entry)


@dataclass(frozen=True)
class Detached:
    """What a compaction goes on with whose sequence is gone."""

    source: tuple[KVCacheBlock, ...]
    """The exact blocks of its tokens."""
    below: tuple[KVCacheBlock, ...]
    """What its segment is going to stand on: the exact blocks in front, other entries'."""
    before: tuple[KVCacheBlock, ...]
    """Of these, the exact ones in front of the first segment of a text."""
    parent: Entry | None

    @property
    def blocks(self) -> tuple[KVCacheBlock, ...]:
        """All that are held until it is over."""
        return (*self.below, *self.source)


class CompactingManager(FullAttentionManager):
    """Full-attention block manager that can swap a span of blocks for a compacted segment."""

    def __init__(self, kv_cache_spec: CompactableAttentionSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # vLLM's factory passes this bound to window-like specs only.
        self.max_admission_blocks_per_request = cdiv(kv_cache_spec.peak_tokens, self.block_size)
        self.compacted: dict[str, CompactedBlocks] = {}
        self.targets: dict[int, list[KVCacheBlock]] = {}
        self.detached: dict[int, Detached] = {}
        """By the compaction, whose sequences have ended."""
        self.cache = CompactCache(self.block_pool, self.kv_cache_group_id, self.block_size)
        self.windows: Sequence[SlidingWindowManager] = ()
        """Of the layers that are not compacted: those with a window."""
        self.states: Sequence[MambaManager] = ()
        """And those with a state."""
        self._found: dict[str, tuple[Entry, ...]] = {}
        self._attached: defaultdict[str, list[int]] = defaultdict(list)

    @property
    def others(self) -> tuple[SingleTypeKVCacheManager, ...]:
        """Of all layers that are not compacted."""
        return (*self.windows, *self.states)

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
        self.cache.give_chances(count)
        target = self.block_pool.get_new_blocks(count)
        self.targets[job_id] = target
        segment = Segment(span.start, span.end, span.slots, tuple(b.block_id for b in target))
        return segment, tuple(b.block_id for b in source)

    def release_target(self, job_id: int) -> None:
        """The compaction was given up: its blocks go back."""
        self.block_pool.free_blocks(reversed(self.targets.pop(job_id)))

    def commit(
        self, job_id: int, request_id: str, segment: Segment, hashes: Sequence[BlockHash] | None
    ) -> bool:
        """The segment takes the place of its tokens' blocks, which go back to the pool.

        Blocks shared with other sequences only lose this owner. Those with a prefix hash stay
        evictable, so a later prompt can still hit the exact prefix.

        Args:
            hashes: of the text's blocks, where the segment is to be published.

        Returns:
            whether it was.
        """
        state = self.compacted.setdefault(request_id, CompactedBlocks())
        target = self.targets.pop(job_id)
        entry = None
        if hashes is not None and state.shared:
            before = self.req_to_blocks[request_id][: segment.start // self.block_size]
            before = [] if state.tip else before
            entry = self.cache.publish(state.tip, hashes, segment, job_id, target, before)
        if entry is None:
            state.segments.append(segment)
            state.blocks.extend(target)
            # What it computes from now on has seen the segment: vLLM must not file it under the
            # hash of its text, where a request that asks for exact KV would find it.
            self._file_no_more(request_id)
        else:
            state.add(entry)
            self._attached[request_id].append(entry.segment_id)
        self._leave_out(request_id, segment, published=entry is not None)
        return entry is not None

    def _leave_out(self, request_id: str, segment: Segment, published: bool) -> None:
        """The sequence gives up the exact blocks of a segment's tokens.

        Who begins with a published one has no use for them.
        """
        blocks = self.req_to_blocks[request_id]
        first, last = segment.start // self.block_size, segment.end // self.block_size
        exact, blocks[first:last] = blocks[first:last], [self._null_block] * (last - first)
        self.block_pool.free_blocks(reversed(exact))
        if published:
            self.cache.hand_out_first([block for block in exact if block.ref_cnt == 0])

    def detach(self, job_id: int, request_id: str, segment: Segment) -> None:
        """The sequence is about to end, its compaction goes on for others."""
        state = self.compacted.get(request_id)
        first, last = segment.start // self.block_size, segment.end // self.block_size
        text = self.req_to_blocks[request_id][:last]
        exact = tuple(block for block in text[:first] if not block.is_null)
        detached = Detached(
            source=tuple(text[first:]),
            below=(*exact, *(state.blocks if state else ())),
            before=() if state else exact,
            parent=state.tip if state else None,
        )
        self.block_pool.touch(detached.blocks)
        self.detached[job_id] = detached

    def commit_detached(self, job_id: int, segment: Segment, hashes: Sequence[BlockHash]) -> bool:
        """The segment is there for sequences to come, and free until one comes.

        Returns:
            whether it was published: there may be such a segment by now.
        """
        target, detached = self.targets.pop(job_id), self.detached.pop(job_id)
        entry = self.cache.publish(
            detached.parent, hashes, segment, job_id, target, detached.before
        )
        # From the last one on: see ``pop_blocks_for_free``.
        self.block_pool.free_blocks(reversed([*detached.below, *target, *detached.source]))
        if entry is not None:
            self.cache.hand_out_first([b for b in detached.source if b.ref_cnt == 0])
        return entry is not None

    def release_detached(self, job_id: int) -> None:
        """It was given up: all that it has held goes back."""
        self.release_target(job_id)
        self.block_pool.free_blocks(reversed(self.detached.pop(job_id).blocks))

    def adopt(self, request_id: str, entry: Entry) -> None:
        """A running sequence takes a published segment in place of its own tokens' blocks."""
        self._attach(request_id, entry)
        self._leave_out(request_id, entry.segment, published=True)

    def _attach(self, request_id: str, entry: Entry) -> None:
        self.block_pool.touch(entry.blocks)
        entry.used(self.block_size)
        self.compacted.setdefault(request_id, CompactedBlocks()).add(entry)
        self._attached[request_id].append(entry.segment_id)

    def take_attached(self) -> list[Attachment]:
        """What the workers have to be told of since the last time."""
        attached = [Attachment(name, tuple(ids)) for name, ids in self._attached.items()]
        self._attached.clear()
        return attached

    def begin_on(self, request_id: str, chain: tuple[Entry, ...]) -> None:
        """If the request is admitted now, it begins life on these entries."""
        self._found.pop(request_id, None)
        if chain:
            self._found[request_id] = chain

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Without the tokens that entries stand for, and with the entries' blocks that are free."""
        chain = self._found.get(request_id)
        if chain is None or not new_computed_blocks:
            chain, left_out, real = (), 0, new_computed_blocks
        else:
            real = [block for block in new_computed_blocks if not block.is_null]
            left_out = (len(new_computed_blocks) - len(real)) * self.block_size
        needed: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens - left_out,
            real,
            total_computed_tokens - left_out,
            num_local_computed_tokens - left_out,
            *args,
            **kwargs,
        )
        # They leave the free queue with the request.
        needed += sum(block.ref_cnt == 0 for entry in chain for block in entry.blocks)
        return needed if chain else needed + self._kept_from(request_id)

    def _kept_from(self, request_id: str) -> int:
        """Free blocks of entries that a new request does not get, as long as it can wait for those
        of sequences that run: who is admitted in their place would have them made again."""
        if request_id in self.req_to_blocks or not any(self.req_to_blocks.values()):
            return 0
        used = sum(len(e.blocks) for state in self.compacted.values() for e in state.entries)
        return max(0, self.cache.kept - used)

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """Before any new block is taken: it might be one of the chain's."""
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        for entry in self._found.pop(request_id, ()):
            self._attach(request_id, entry)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> list[KVCacheBlock]:
        """Others before those of entries."""
        held = len(self.req_to_blocks[request_id])
        self.cache.give_chances(max(0, cdiv(num_tokens, self.block_size) - held))
        allocated: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, num_tokens, *args, **kwargs
        )
        return allocated

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """What is computed over entries is found by sequences that stand on the same ones."""
        state = self.compacted.get(request.request_id)
        if state is None or not state.shared:
            super().cache_blocks(request, num_tokens, *args, **kwargs)
            return
        first = self.num_cached_block.get(request.request_id, 0)
        last = num_tokens // self.block_size
        if first < last:
            blocks = self.req_to_blocks[request.request_id][first:last]
            self.cache.file_behind(state.entries[-1], request.block_hashes, blocks, first)
            self.num_cached_block[request.request_id] = last

    def _file_no_more(self, request_id: str) -> None:
        """As if all its blocks were cached: none that is still to come becomes others' prefix."""
        for manager in (self, *self.others):
            manager.num_cached_block[request_id] = sys.maxsize

    def commit_merge(self, job_id: int, request_id: str, segment: Segment) -> None:
        """The segment takes the place of all earlier ones, whose blocks go back to the pool."""
        state = self.compacted[request_id]
        merged, state.blocks = state.blocks, self.targets.pop(job_id)
        state.segments = [segment]
        self.block_pool.free_blocks(reversed(merged))

    def hold_windows(self, request_id: str, tokens: int) -> list[list[KVCacheBlock]] | None:
        """Blocks that layers with a window need to go on behind the first ``tokens`` (whole blocks)
        of a sequence, by group: its own, held once more. None where its window has moved on."""
        held = []
        for manager in self.windows:
            first = max(0, tokens - manager.sliding_window + 1) // self.block_size
            blocks = manager.req_to_blocks[request_id][first : tokens // self.block_size]
            if any(block.is_null for block in blocks):
                return None
            held.append(list(blocks))
        for blocks in held:
            self.block_pool.touch(blocks)
        return held

    def let_windows_go(self, held: Sequence[Sequence[KVCacheBlock]]) -> None:
        """What :meth:`hold_windows` has held."""
        for blocks in held:
            self.block_pool.free_blocks(reversed(blocks))

    def share_prefix(
        self,
        parent_id: str,
        request_id: str,
        tokens: int,
        windows: Sequence[Sequence[KVCacheBlock]],
    ) -> None:
        """A new sequence begins with the first ``tokens`` (whole blocks) of another one.

        It shares the exact blocks; the compacted ones stay the parent's alone, which outlives it.

        Args:
            windows: see :meth:`hold_windows`.
        """
        count = tokens // self.block_size
        blocks = self.req_to_blocks[parent_id][:count]
        self.block_pool.touch([block for block in blocks if not block.is_null])
        self.req_to_blocks[request_id] = blocks
        for manager, held in zip(self.windows, windows, strict=True):
            self.block_pool.touch(held)
            gone = [self._null_block] * (count - len(held))
            manager.req_to_blocks[request_id] = [*gone, *held]
        self._file_no_more(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """vLLM's one exit for finish, abort and preemption: the compacted blocks leave with it.

        They are freed from the last one on, so that what is published is handed out again after
        what stands on it, and the protected blocks in front of it, without which it is of no use,
        at the very end.
        """
        state = self.compacted.pop(request_id, None)
        self._found.pop(request_id, None)
        self._attached.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        if state is None:
            return blocks
        first = state.segments[0].start // self.block_size
        return [*blocks[:first], *state.blocks, *blocks[first:]]

    def check(self, other_owners: Iterable[Sequence[KVCacheBlock]] = ()) -> None:
        """Every block's reference count equals the number of its owners (debugging, tests).

        Raises:
            AssertionError: naming the first blocks that do not add up.
        """
        owners: Counter[int] = Counter()
        for manager in (self, *self.others):
            for blocks in manager.req_to_blocks.values():
                owners.update(b.block_id for b in blocks if not b.is_null)
        targets = list(self.targets.values())
        held = [each.blocks for each in self.detached.values()]
        segments = [s.blocks for s in self.compacted.values()]
        for blocks in [*segments, *targets, *held, *other_owners]:
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
        published = {
            b.block_id for s in self.compacted.values() for e in s.entries for b in e.blocks
        }
        private = [b for s in self.compacted.values() for b in s.blocks]
        private = [b for b in private if b.block_id not in published]
        for block in [*private, *(b for blocks in targets for b in blocks)]:
            if block.ref_cnt != 1 or block.block_hash is not None:
                raise AssertionError("a private compacted block is shared or has a prefix hash")
        if not all(entry.alive for s in self.compacted.values() for entry in s.entries):
            raise AssertionError("a sequence stands on an entry that is gone")
