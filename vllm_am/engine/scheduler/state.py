"""Everything that compaction keeps in the engine core, put together once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import MambaManager, SlidingWindowManager
from vllm.v1.request import Request

from vllm_am.config import CompactionConfig
from vllm_am.engine.footprint import ceil_div
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.scheduler.admission import Admission
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.commit import Commits
from vllm_am.engine.scheduler.give_up import Failures
from vllm_am.engine.scheduler.jobs import Jobs
from vllm_am.engine.scheduler.journal import Journal
from vllm_am.engine.scheduler.named_prefixes import NamedPrefixes
from vllm_am.engine.scheduler.pace import Pace
from vllm_am.engine.scheduler.planner import Planner
from vllm_am.engine.scheduler.prefix_commands import PrefixCommands
from vllm_am.engine.scheduler.query_pool import QueryPool
from vllm_am.engine.scheduler.reference_queries import ReferenceQueries
from vllm_am.engine.scheduler.sequences import Sequences
from vllm_am.engine.scheduler.sharing import Sharing
from vllm_am.engine.scheduler.transfers import Transfers
from vllm_am.engine.stats import Holdings


@dataclass(frozen=True)
class CompactionState:
    """The parts of compaction beside one scheduler of vLLM."""

    config: CompactionConfig
    limits: EngineLimits
    planner: Planner
    blocks: CompactingManager
    query_pool: QueryPool
    queries: ReferenceQueries
    sequences: Sequences
    sharing: Sharing
    admission: Admission
    jobs: Jobs
    pace: Pace
    commits: Commits
    failures: Failures
    journal: Journal
    names: NamedPrefixes
    transfers: Transfers
    commands: PrefixCommands

    @classmethod
    def of(cls, scheduler: Scheduler) -> CompactionState:
        """Built when vLLM's scheduler is complete.

        Raises:
            NotImplementedError: the model has layers of another kind than these.
        """
        limits = EngineLimits.from_vllm_config(scheduler.vllm_config)
        blocks = _compacting_manager(scheduler, limits.block_size)
        if limits.config.pass_fraction:
            _retain_windows(blocks, limits)
        pool = blocks.block_pool
        others = [window.max_admission_blocks_per_request or 0 for window in blocks.windows]
        others += [_state_blocks(manager, scheduler.vllm_config) for manager in blocks.states]
        pace = Pace(limits)
        usable = pool.num_gpu_blocks - 1
        planner = Planner.of(limits, usable, len(others), sum(others), pace.steps)
        query_pool = QueryPool(
            capacity=limits.query_pool_positions(pool.num_gpu_blocks),
            block_size=limits.block_size,
            max_positions=scheduler.max_model_len + scheduler.num_lookahead_tokens + 1,
            is_live=lambda block_id: pool.blocks[block_id].ref_cnt > 0,
        )
        journal = Journal(collected=scheduler.log_stats)
        queries = ReferenceQueries(limits, blocks, query_pool)
        sequences = Sequences(limits, planner, blocks, draft_tokens=scheduler.num_spec_tokens)
        sharing = Sharing(planner, blocks, sequences, journal)
        jobs = Jobs(limits, blocks, query_pool, pace)
        names = NamedPrefixes(blocks, planner, limits.config.pinned_share)
        transfers = Transfers(blocks, names, query_pool, jobs.next_id)
        commands = PrefixCommands(
            scheduler.vllm_config, limits, planner, blocks, jobs, names, transfers, journal
        )
        return cls(
            config=limits.config,
            limits=limits,
            planner=planner,
            blocks=blocks,
            query_pool=query_pool,
            queries=queries,
            sequences=sequences,
            sharing=sharing,
            admission=Admission(planner, blocks, sequences, sharing, queries, jobs),
            jobs=jobs,
            pace=pace,
            commits=Commits(blocks, queries, journal),
            failures=Failures(
                blocks, planner, sequences, journal, limits.config.max_error, queries
            ),
            journal=journal,
            names=names,
            transfers=transfers,
            commands=commands,
        )

    def holdings(self) -> Holdings:
        """What compaction holds at present."""
        held = list(self.blocks.compacted.values())
        targets = sum(map(len, self.blocks.targets.values()))
        # What several sequences stand on is held once.
        segments = {s.block_ids: s.slots for each in held for s in each.segments}
        blocks = {block.block_id for each in held for block in each.blocks}
        cached = list(self.blocks.cache.entries())
        ours = [block.ref_cnt > 0 for entry in cached for block in entry.blocks]
        return Holdings(
            sequences=len(held),
            fits=len(self.jobs.all),
            slots=sum(segments.values()),
            blocks=len(blocks) + targets,
            query_pool_share=round(self.query_pool.used / self.query_pool.capacity, 4),
            cache_entries=len(cached),
            cache_blocks_used=sum(ours),
            cache_blocks_free=len(ours) - sum(ours),
            cache_blocks_pinned=self.names.block_count,
        )


def _retain_windows(blocks: CompactingManager, limits: EngineLimits) -> None:
    """Layers with a window keep what passes need, which start behind the span that is compacted:
    before the recent tokens, where a block begins, some steps later."""
    more = limits.config.recent_tokens + 2 * limits.block_size
    for window in blocks.windows:
        window.extra_retained_tokens += more
        if window.max_admission_blocks_per_request is not None:
            window.max_admission_blocks_per_request += ceil_div(more, limits.block_size)


def _state_blocks(manager: MambaManager, vllm_config: VllmConfig) -> int:
    """Most blocks that one sequence holds for layers with a state."""
    spec = manager.kv_cache_spec
    return ceil_div(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)


def _file_states_of_exact_text(manager: MambaManager) -> None:
    """States that have seen a segment are not filed as those of their text.

    vLLM files the one at the end of a prompt whatever ``num_cached_block`` says, by which
    :class:`CompactingManager` tells which sequences these are.
    """
    file = manager.cache_blocks

    def cache_blocks(request: Request, *args: Any, **kwargs: Any) -> None:
        if manager.num_cached_block.get(request.request_id, 0) < sys.maxsize:
            file(request, *args, **kwargs)

    manager.cache_blocks = cache_blocks


def _compacting_manager(scheduler: Scheduler, block_size: int) -> CompactingManager:
    """The manager of the layers that are compacted; it knows of those of the others."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    ours = [manager for manager in managers if isinstance(manager, CompactingManager)]
    others = [manager for manager in managers if not isinstance(manager, CompactingManager)]
    windows = [manager for manager in others if isinstance(manager, SlidingWindowManager)]
    states = [manager for manager in others if isinstance(manager, MambaManager)]
    same = {manager.block_size for manager in (*ours, *windows)} == {block_size}
    if len(ours) != 1 or len(others) != len(windows) + len(states) or not same:
        found = [f"{type(m.kv_cache_spec).__name__} ({m.block_size})" for m in managers]
        raise NotImplementedError(
            "--kv-compaction: layers must form one group of full attention and groups with a "
            "sliding window or a state, all with the same number of KV heads and in blocks of "
            f"{block_size} tokens; this model has {found}; drop --kv-compaction"
        )
    ours[0].windows, ours[0].states = windows, states
    for manager in states:
        _file_states_of_exact_text(manager)
    return ours[0]
