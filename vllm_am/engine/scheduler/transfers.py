"""Compacted prefixes to files and back, part by part: what is under way, and who holds what for it.

One part a step: the protected tokens, or one span. Each rank writes (reads) its own heads; a part
that fails on one of them has failed, and with it the whole. What is saved is held until it is
written; what is loaded is nobody's until all of it is there. Files are put together in a thread.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_am.engine.messages import CompactionStep, LoadedPart, PartReport, SavedPart, Segment
from vllm_am.engine.prefix_file import (
    PROTECTED,
    PrefixFile,
    PrefixHeader,
    delete_parts,
    join_parts,
)
from vllm_am.engine.prefix_requests import Answer, PrefixRefused, Refusal, refusal
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.compact_cache import Entry
from vllm_am.engine.scheduler.named_prefixes import NamedPrefix, NamedPrefixes
from vllm_am.engine.scheduler.query_pool import QueryPool


@dataclass
class Transfer:
    """A prefix on its way to a file, or from one."""

    number: str
    path: Path
    parts: deque[SavedPart | LoadedPart]
    """Those that were not sent yet."""
    held: list[KVCacheBlock]
    finish: Callable[[Transfer], Answer | None]
    """When all parts are done; None where the answer is given later."""
    answer: Future[Answer] = field(default_factory=Future)
    sent: dict[str, int | None] = field(default_factory=dict)
    """Parts that were not reported yet, and the segments that they load."""
    loaded: list[int] = field(default_factory=list)
    """Segments that the workers have by now."""
    targets: list[tuple[Segment, int, list[KVCacheBlock]]] = field(default_factory=list)
    """What is loaded, span by span: the segment, its number, its blocks."""

    @property
    def saves(self) -> bool:
        return not self.targets


class Transfers:
    """All of one engine.

    Args:
        next_id: what the next segment is known by.
    """

    def __init__(
        self,
        blocks: CompactingManager,
        names: NamedPrefixes,
        query_pool: QueryPool,
        next_id: Callable[[], int],
    ) -> None:
        self._blocks = blocks
        self._names = names
        self._query_pool = query_pool
        self._next_id = next_id
        self._running: dict[str, Transfer] = {}
        self._given_up: dict[tuple[str, str], tuple[Transfer, int | None]] = {}
        """Parts that were sent for nothing, and the segments that they load."""
        self._dropped: list[int] = []
        self._thread = ThreadPoolExecutor(1, "kv-compaction-files")

    @property
    def under_way(self) -> bool:
        """Whether the engine has to go on stepping for some."""
        return bool(self._running or self._given_up)

    @property
    def held(self) -> list[Sequence[KVCacheBlock]]:
        """The blocks of each."""
        return [transfer.held for transfer in self._running.values()]

    def save(self, prefix: NamedPrefix, header: PrefixHeader, path: Path) -> Future[Answer]:
        """Write a prefix to a file.

        Returns:
            its description, or why it could not be written.
        """
        number = uuid.uuid4().hex[:12]
        front = [b.block_id for b in prefix.blocks[: header.start // self._blocks.block_size]]
        parts: deque[SavedPart | LoadedPart] = deque()
        for name, entry in zip(header.names, (None, *prefix.chain), strict=True):
            segment_id = None if entry is None else entry.segment_id
            block_ids = () if entry is not None else tuple(front)
            parts.append(SavedPart(number, name, str(path), segment_id, block_ids))

        def join(transfer: Transfer) -> None:
            self._thread.submit(_join, transfer, header, prefix)

        self._blocks.block_pool.touch(prefix.blocks)
        return self._begin(Transfer(number, path, parts, list(prefix.blocks), join))

    def load(
        self,
        name: str,
        file: PrefixFile,
        hashes: Sequence[BlockHash],
        segments: Sequence[tuple[int, int]],
    ) -> Future[Answer]:
        """Read a prefix from a file into free blocks, and give it a name.

        Args:
            hashes: of the text's blocks, in this engine.
            segments: for each span slots per head, and the blocks that they need here.

        Returns:
            its description, or why it could not be read.

        Raises:
            PrefixRefused: there is no room.
        """
        header, pool, cache = file.header, self._blocks.block_pool, self._blocks.cache
        count = header.start // self._blocks.block_size
        cached = cache.exact(hashes, count)
        new = (0 if cached else count) + sum(blocks for _, blocks in segments)
        # Those in front may be held by another name already; to count them is on the safe side.
        self._names.check_room(new + len(cached or ()), name)
        needed = new + sum(block.ref_cnt == 0 for block in cached or ())
        if needed > pool.get_num_free_blocks():
            free = pool.get_num_free_blocks()
            raise PrefixRefused(
                Refusal.NO_ROOM,
                f"name={name!r}: {needed} KV blocks are needed, and {free} are free now; try again "
                "later",
            )
        if cached is not None:
            pool.touch(cached)
        cache.give_chances(new)
        number = uuid.uuid4().hex[:12]
        transfer = Transfer(
            number, file.path, deque(), [], lambda t: self._publish(t, name, file, hashes)
        )
        front = cached if cached is not None else pool.get_new_blocks(count)
        transfer.held.extend(front)
        if cached is None and count:
            exact = Segment(0, header.start, header.start, tuple(b.block_id for b in front))
            transfer.parts.append(LoadedPart(number, PROTECTED, str(file.path), None, exact))
        names = list(header.names)[1:]
        for part, (start, end), (slots, blocks) in zip(names, header.spans, segments, strict=True):
            target, segment_id = pool.get_new_blocks(blocks), self._next_id()
            transfer.held.extend(target)
            segment = Segment(start, end, slots, tuple(b.block_id for b in target))
            transfer.targets.append((segment, segment_id, target))
            transfer.parts.append(LoadedPart(number, part, str(file.path), segment_id, segment))
        own = transfer.held if cached is None else transfer.held[count:]
        self._query_pool.forget([block.block_id for block in own])
        return self._begin(transfer)

    def _begin(self, transfer: Transfer) -> Future[Answer]:
        self._running[transfer.number] = transfer
        return transfer.answer

    def send(self, step: CompactionStep) -> None:
        """Put the next part on its way to the workers, and what they may forget."""
        step.dropped += self._dropped
        self._dropped.clear()
        for transfer in self._running.values():
            if transfer.parts:
                part = transfer.parts.popleft()
                if isinstance(part, SavedPart):
                    transfer.sent[part.name] = None
                    step.saved.append(part)
                else:
                    transfer.sent[part.name] = part.segment_id
                    step.loaded.append(part)
                return

    def note(self, report: PartReport) -> None:
        """What the workers say of a part."""
        transfer = self._running.get(report.transfer)
        if transfer is None:
            transfer, segment_id = self._given_up.pop((report.transfer, report.name))
            if transfer.saves:
                self._thread.submit(delete_parts, transfer.path, transfer.number)
            elif segment_id is not None and report.failure is None:
                self._dropped.append(segment_id)
            return
        segment_id = transfer.sent.pop(report.name)
        if report.failure is not None:
            self._give_up(transfer, report.failure)
            return
        if segment_id is not None:
            transfer.loaded.append(segment_id)
        if not transfer.sent and not transfer.parts:
            del self._running[transfer.number]
            answer = transfer.finish(transfer)
            self._let_go(transfer)
            if answer is not None:
                transfer.answer.set_result(answer)

    def _publish(
        self, transfer: Transfer, name: str, file: PrefixFile, hashes: Sequence[BlockHash]
    ) -> Answer:
        """All of it is there: others find it from now on."""
        cache, header = self._blocks.cache, file.header
        front = transfer.held[: header.start // self._blocks.block_size]
        if any(block.block_hash is None for block in front):
            cache.file_exact(hashes, front)
        chain: list[Entry] = []
        for segment, segment_id, target in transfer.targets:
            parent = chain[-1] if chain else None
            before = [] if chain else front
            entry = cache.publish(parent, hashes, segment, segment_id, target, before)
            if entry is None:  # it has been compacted here meanwhile, and is as good
                self._dropped.append(segment_id)
                entry = cache.same(parent, hashes, segment)
            chain.append(entry)
        try:
            prefix = self._names.pin(name, file.token_ids, header.salt, header.ratio, chain, front)
        except PrefixRefused as refused:
            return refusal(refused.why, str(refused))
        return prefix.describe()

    def _give_up(self, transfer: Transfer, why: str) -> None:
        del self._running[transfer.number]
        for name, segment_id in transfer.sent.items():
            self._given_up[transfer.number, name] = transfer, segment_id
        self._dropped += transfer.loaded
        if transfer.saves:
            self._thread.submit(delete_parts, transfer.path, transfer.number)
        self._let_go(transfer)
        transfer.answer.set_result(refusal(Refusal.WRONG, f"{transfer.path}: {why}"))

    def _let_go(self, transfer: Transfer) -> None:
        self._blocks.block_pool.free_blocks(reversed(transfer.held))

    def cancel_all(self) -> None:
        """All blocks are needed."""
        for transfer in list(self._running.values()):
            self._give_up(transfer, "the cache was reset")


def _join(transfer: Transfer, header: PrefixHeader, prefix: NamedPrefix) -> None:
    """In a thread: nobody waits for it but who asked."""
    try:
        join_parts(transfer.path, header, prefix.token_ids, transfer.number)
        transfer.answer.set_result(
            {**prefix.describe(), "file": str(transfer.path), "bytes": transfer.path.stat().st_size}
        )
    except Exception as error:
        delete_parts(transfer.path, transfer.number)
        says = f"{transfer.path}: cannot be written ({str(error)[:200]})"
        transfer.answer.set_result(refusal(Refusal.WRONG, says))
