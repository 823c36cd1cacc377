"""What operators ask of an engine: give compacted prefixes a name, list, save, load, drop them.

vLLM symbols touched: ``v1.engine.core.EngineCore`` is given one more method, which front ends call
as vLLM's own utilities. Why: names are kept beside the scheduler, and vLLM has no way for a plugin
to be asked anything there (``collective_rpc`` ends at the workers). It can go when vLLM lets
schedulers have utilities. ``v1.request.Request`` and the hasher in ``v1.core.kv_cache_utils`` find
what a text is filed under.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import BlockHash, get_request_block_hasher
from vllm.v1.request import Request

from vllm_am.compaction.pages import page_slots
from vllm_am.config import CompactionConfigError
from vllm_am.engine.footprint import ceil_div
from vllm_am.engine.identity import checked_file, header_for
from vllm_am.engine.layers import full_layers
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.prefix_file import PrefixFile, PrefixFileError
from vllm_am.engine.prefix_requests import UTILITY, Answer, PrefixRefused, Refusal, refusal
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.compact_cache import Entry
from vllm_am.engine.scheduler.jobs import Jobs
from vllm_am.engine.scheduler.journal import Journal
from vllm_am.engine.scheduler.named_prefixes import NamedPrefixes, blocks_in_front
from vllm_am.engine.scheduler.planner import Planner
from vllm_am.engine.scheduler.transfers import Transfers


class PrefixCommands:
    """Everything that can be asked; answers are of JSON's types, and refusals are answers."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        limits: EngineLimits,
        planner: Planner,
        blocks: CompactingManager,
        jobs: Jobs,
        names: NamedPrefixes,
        transfers: Transfers,
        journal: Journal,
    ) -> None:
        self._vllm_config = vllm_config
        self._limits = limits
        self._planner = planner
        self._blocks = blocks
        self._jobs = jobs
        self._names = names
        self._transfers = transfers
        self._journal = journal
        self._commands: dict[str, Callable[..., Answer | Future[Answer]]] = {
            "list": self.list_all,
            "drop": self.drop,
            "pin": self.pin,
            "save": self.save,
            "load": self.load,
        }
        self._hashed: tuple[str | None, Sequence[int], Sequence[BlockHash]] | None = None
        """Of the last text: it is asked for again and again until it is there."""
        self._to_preload = [self._checked(Path(path), False) for path in limits.config.preload]
        self._check_preload()

    def run(self, action: str, arguments: dict[str, Any]) -> Answer | Future[Answer]:
        """Do what is asked; never raises for what it brings."""
        try:
            return self._commands[action](**arguments)
        except PrefixRefused as refused:
            return refusal(refused.why, str(refused))
        except PrefixFileError as error:
            return refusal(Refusal.WRONG, str(error))

    def list_all(self) -> Answer:
        """All names, and what they may hold."""
        return {"prefixes": [prefix.describe() for prefix in self._names]}

    def drop(self, name: str) -> Answer:
        """Take a name away; what it held is free."""
        prefix = self._names.drop(name)
        self._journal.prefix_dropped(name)
        return prefix.describe()

    def pin(
        self, name: str, token_ids: Sequence[int], salt: str | None, ratio: float | None, end: int
    ) -> Answer:
        """Give what has been compacted of a text a name; nothing more where it has it already.

        Args:
            end: tokens that it should have at least; less is not pinned.

        Returns:
            its description, or how far it has got, and whether more of it is coming.
        """
        ratio = ratio or self._limits.config.ratio
        if (old := self._names.find(name)) is not None and (old.salt, old.ratio) == (salt, ratio):
            text = tuple(token_ids)
            if end <= len(old.token_ids) and old.token_ids == text[: len(old.token_ids)]:
                return old.describe()
        self._names.check_free(name)
        hashes = self._hashes(token_ids, salt)
        chain = self._chain(hashes, len(token_ids), ratio)
        front = blocks_in_front(self._blocks, hashes, chain) if chain else None
        reached = chain[-1].segment.end if chain and front is not None else 0
        if front is None or reached < end:
            return {"reached": reached, "coming": self._is_coming(hashes)}
        prefix = self._names.pin(name, token_ids, salt, ratio, chain, front)
        self._journal.prefix_pinned(prefix)
        return prefix.describe()

    def _is_coming(self, hashes: Sequence[BlockHash]) -> bool:
        """Whether some of a text is being compacted, for whoever it is."""
        cache = self._blocks.cache
        for job in self._jobs.all:
            text = cache.text(hashes, job.segment.end)
            theirs = cache.text(job.request.block_hashes, job.segment.end)
            if job.key is not None and text is not None and text == theirs:
                return True
        return False

    def save(self, name: str, path: str) -> Answer | Future[Answer]:
        """Write a prefix to a file, on the first of several engines."""
        prefix = self._names.get(name)
        if self._vllm_config.parallel_config.data_parallel_rank_local not in (None, 0):
            return {**prefix.describe(), "file": path}
        spans = tuple((entry.segment.start, entry.segment.end) for entry in prefix.chain)
        header = header_for(self._vllm_config, prefix.ratio, prefix.salt, spans)
        return self._transfers.save(prefix, header, Path(path))

    def load(self, name: str, path: str, any_options: bool = False) -> Answer | Future[Answer]:
        """Read a prefix from a file, and give it a name."""
        self._names.check_free(name)
        return self._load(name, self._checked(Path(path), any_options))

    def _load(self, name: str, file: PrefixFile) -> Answer | Future[Answer]:
        hashes = self._hashes(file.token_ids, file.header.salt)
        chain = self._chain(hashes, file.header.tokens, file.header.ratio)
        front = blocks_in_front(self._blocks, hashes, chain) if chain else None
        if front is not None and chain[-1].segment.end == file.header.tokens:
            prefix = self._names.pin(
                name, file.token_ids, file.header.salt, file.header.ratio, chain, front
            )
            return prefix.describe()
        loading = self._transfers.load(name, file, hashes, self._room_of(file))
        loading.add_done_callback(lambda done: self._journal.prefix_loaded(file, done.result()))
        return loading

    def _room_of(self, file: PrefixFile) -> list[tuple[int, int]]:
        """For each span slots per head, as requests look for them, and blocks that it needs."""
        ratio = file.header.ratio
        return [
            (self._planner.span_slots(end - start, ratio), self._blocks_for(slots))
            for (start, end), slots in zip(file.header.spans, file.slots, strict=True)
        ]

    def _blocks_for(self, slots: Sequence[int]) -> int:
        """Blocks for heads of so many slots each, on the rank that needs most.

        Args:
            slots: by layer and KV head.
        """
        return blocks_needed(slots, self._limits.block_size, head_groups(self._vllm_config))

    def _checked(self, path: Path, any_options: bool) -> PrefixFile:
        """A file that this engine can load; raises PrefixFileError."""
        return checked_file(path, self._vllm_config, self._limits, any_options)

    # -- at startup -----------------------------------------------------------------------------

    def _check_preload(self) -> None:
        """Names differ, and there is room; raises CompactionConfigError."""
        names = [prefix_name(file.path) for file in self._to_preload]
        if len(set(names)) < len(names):
            raise CompactionConfigError(
                "--kv-compaction-preload: two files of the same name, which is what a prefix is "
                f"known by: {', '.join(sorted(names))}; rename one"
            )
        blocks = 0
        for file in self._to_preload:
            blocks += file.header.start // self._limits.block_size
            blocks += sum(needed for _, needed in self._room_of(file))
        try:
            self._names.check_room(blocks, ", ".join(names))
        except PrefixRefused as refused:
            raise CompactionConfigError(f"--kv-compaction-preload: {refused}") from None

    def preload(self) -> None:
        """Begin to load what is to be loaded at startup; of no effect afterwards."""
        files, self._to_preload = self._to_preload, []
        for file in files:
            try:
                self._load(prefix_name(file.path), file)
            except PrefixRefused as refused:  # there was room when the engine started
                self._journal.prefix_loaded(file, refusal(refused.why, str(refused)))

    @property
    def waits(self) -> bool:
        """Whether there is something for the next steps, even without any request."""
        return bool(self._to_preload) or self._transfers.under_way

    # -- texts ----------------------------------------------------------------------------------

    def _hashes(self, token_ids: Sequence[int], salt: str | None) -> Sequence[BlockHash]:
        """Of a text's blocks, as vLLM has them for requests without adapters and images."""
        if self._hashed is not None and self._hashed[:2] == (salt, token_ids):
            return self._hashed[2]
        algorithm = self._vllm_config.cache_config.prefix_caching_hash_algo
        pool = self._blocks.block_pool
        hasher = get_request_block_hasher(pool.hash_block_size, get_hash_fn_by_name(algorithm))
        params = SamplingParams(max_tokens=1)
        request = Request(
            UTILITY, list(token_ids), params, None, cache_salt=salt, block_hasher=hasher
        )
        self._hashed = salt, token_ids, request.block_hashes
        return request.block_hashes

    def _chain(self, hashes: Sequence[BlockHash], tokens: int, ratio: float) -> tuple[Entry, ...]:
        planner = self._planner
        return self._blocks.cache.chain(hashes, tokens, lambda n: planner.span_slots(n, ratio))


def prefix_name(path: Path) -> str:
    """What a file is called that is loaded at startup: ``contract`` of ``contract.kv``."""
    return path.stem


def head_groups(vllm_config: VllmConfig) -> list[list[int]]:
    """The heads of each rank, as indices of all that are compacted, by layer and KV head."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = full_layers(model.hf_text_config)
    total, local = model.get_total_num_kv_heads(), model.get_num_kv_heads(parallel)
    stages, ranks = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    groups = []
    for stage in range(stages):
        begin, end = get_pp_indices(model.get_total_num_hidden_layers(), stage, stages)
        here = [index for index, layer in enumerate(layers) if begin <= layer < end]
        for rank in range(ranks):
            first = rank * total // ranks
            heads = range(first, first + local)
            groups.append([index * total + head for index in here for head in heads])
    return groups


def blocks_needed(slots: Sequence[int], block_size: int, groups: Sequence[Sequence[int]]) -> int:
    """Blocks for heads of so many slots each, on the rank that needs most.

    A block has ``block_size`` slots for each head of a rank, in pages (``compaction/pages.py``).

    Args:
        slots: by head.
        groups: the heads of each rank.
    """
    size = page_slots(block_size)
    pages = [[ceil_div(slots[head], size) for head in group] for group in groups]
    return max(ceil_div(sum(each) * size, len(each) * block_size) for each in pages if each)


def install() -> None:
    """Let front ends ask."""
    from vllm.v1.engine.core import EngineCore

    def ask(self: Any, action: str, arguments: dict[str, Any]) -> Any:
        compaction = getattr(self.scheduler, "compaction", None)
        if compaction is None:
            return refusal(Refusal.OFF, "this engine has no --kv-compaction")
        return compaction.commands.run(action, arguments)

    setattr(EngineCore, UTILITY, ask)
