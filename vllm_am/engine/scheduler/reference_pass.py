"""Reference passes: internal requests that read and write behind a context, for their queries.

vLLM symbols touched (subclassed): ``v1.core.sched.scheduler.Scheduler``, its ``schedule``,
``update_from_output``, ``finish_requests``, ``_preempt_request``, ``_free_request_blocks``,
``make_stats``, ``make_spec_decoding_stats``.

A pass is a request of the engine like any other, except that it starts behind the context of its
*parent*: it shares the parent's blocks (and its compacted segments), as a request does whose KV
came through a connector, so nothing is computed twice and there is no second model. Its queries go
to the query pool under its own name and outlive its blocks. When all passes of a sequence are over,
its compaction starts, with their queries.

On-policy the texts are read once more when the model has written its own, all of them in one step,
in whose forward pass the layers are compacted (``Fitting.fit_on_policy``): each layer from queries
that come through layers compacted before it, at the price of one pass and not of one per layer.

A pass never stands in a user's way: it starts only while nobody waits, in free blocks and a free
slot; it is scheduled behind all users and ends early, keeping the queries it has, when they need
its blocks or its slot. What is missing is made up from the queries of the prompt itself. Passes are
invisible in outputs and in vLLM's metrics.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vllm import SamplingParams
from vllm.config import ModelConfig
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_am.engine.footprint import ceil_div
from vllm_am.engine.messages import SharedPrefix
from vllm_am.engine.scheduler.planner import SequenceView, Span
from vllm_am.engine.scheduler.query_sources import PassPlan, plan_passes, read_together
from vllm_am.engine.scheduler.reference_queries import Sampling
from vllm_am.engine.scheduler.state import CompactionState
from vllm_am.engine.scheduler.study import Study

#: How the model writes in self-study (paper's code, without thinking).
STUDY_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}

#: Steps that a study waits for its first room before the compaction goes on without it.
PATIENCE_STEPS = 16

#: Behind every user under vLLM's priority policy too.
LAST_PRIORITY = 1 << 30


def end_tokens(model: ModelConfig) -> list[int]:
    """Token ids at which the model ends an answer, from its two configuration files."""
    entries = (
        model.hf_text_config.eos_token_id,
        model.try_get_generation_config().get("eos_token_id"),
    )
    found: set[int] = set()
    for entry in entries:
        found.update([entry] if isinstance(entry, int) else entry or [])
    return sorted(found)


class ReferencePassMixin(Scheduler):
    """Adds reference passes to a vLLM scheduler class; see the module docstring."""

    # Set by the compaction scheduler, which is built on this class.
    compaction: CompactionState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.studies: dict[str, Study] = {}
        """By parent, from the decision to compact it until the fit has ended."""
        self.passes: dict[str, Study] = {}
        """By pass, while it is a request."""
        self.reference_tokens = 0
        """Tokens that passes have computed and that were not reported yet."""
        self._ended_passes: set[str] = set()
        self._end_tokens = end_tokens(self.vllm_config.model_config)

    # -- studies --------------------------------------------------------------------------------

    def begin_study(self, parent: Request, span: Span) -> Study:
        """Plan the passes before a span of ``parent`` is compacted.

        The study is over at once where there is no room for any pass.
        """
        plans = plan_passes(
            self.compaction.config,
            parent.all_token_ids[span.start : span.end],
            room=self.max_model_len - self.num_lookahead_tokens - span.end,
            positions=self.compaction.limits.sample_positions,
        )
        target = ceil_div(span.slots, self.compaction.limits.block_size)
        windows = self.compaction.blocks.hold_windows(parent.request_id, span.end)
        if windows is None:
            plans, windows = [], []
        study = Study(parent, span, target, deque(plans), windows, cut_short=not plans)
        if self.compaction.config.on_policy:
            study.waiting = deque(plan for plan in plans if plan.answer_tokens)
            study.together = [plan for plan in plans if not plan.answer_tokens]
        self.studies[parent.request_id] = study
        return study

    def end_study(self, parent_id: str) -> None:
        """The compaction is over or will not be: passes end, and their queries are forgotten."""
        study = self.studies.pop(parent_id, None)
        if study is None:
            return
        for pass_id in list(study.running):
            self._end_pass(pass_id)
        self.compaction.blocks.let_windows_go(study.windows)
        for owners in study.owners.values():
            self.compaction.query_pool.forget(owners)

    def after_passes(self, view: SequenceView, due: Span) -> Span | None:
        """What of a span that is due can be compacted now: None while its passes run.

        The passes saw the sequence up to a point, and so do their queries: what came later has to
        wait for the next compaction. A prompt is compacted before its prefill is complete only
        because the pool cannot hold it: no time for passes then, and no room.
        """
        if not self.compaction.config.pass_fraction:
            return due
        study = self.studies.get(due.request_id)
        if study is None:
            request = self.requests[due.request_id]
            if view.computed < view.prompt or request.prompt_token_ids is None:
                return due
            study = self.begin_study(request, due)
        if not study.over:
            return None
        if due.end <= study.end:
            return due
        seen = replace(view, computed=study.end + self.compaction.config.recent_tokens)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return self.compaction.planner.next_span(seen, free)

    def falls_short(self, span: Span, on_policy: bool) -> bool:
        """A fit without the passes that it should have, or not in the middle of them."""
        config = self.compaction.config
        study = self.studies.get(span.request_id)
        missing = bool(config.pass_fraction) and (study is None or study.cut_short)
        return missing or on_policy != config.on_policy

    def _cut_short(self, study: Study) -> None:
        """No further passes; those that run go on."""
        study.cut_short = True
        study.waiting.clear()
        study.together.clear()

    # -- passes ---------------------------------------------------------------------------------

    def _start_passes(self) -> None:
        """Make requests of planned passes, as many as free slots and blocks allow."""
        for study in self.studies.values():
            while (
                study.waiting
                and self._may_start()
                and self._has_blocks(study.end, study.waiting[0])
            ):
                self._start_pass(study, study.waiting.popleft())
            if study.together and not study.waiting and not study.running:
                self._start_together(study)
            if (study.waiting or study.together) and not self.passes:
                # Slots come free in time. In a full pool nothing does without compaction.
                study.idle_steps += 1
                first = study.waiting[0] if study.waiting else study.together[0]
                if study.idle_steps > PATIENCE_STEPS or not self._has_blocks(study.end, first):
                    self._cut_short(study)

    def _start_together(self, study: Study) -> None:
        """Start the passes that one step can read, unless a later one could read far more."""
        if not self._may_start():
            return
        new = self._new_passes()
        slots = self.max_num_active_reqs - self._active_requests() - len(new)
        most = self.max_num_scheduled_tokens
        longest = self.scheduler_config.long_prefill_token_threshold or most
        at_best = read_together(study.together, slots, most - len(self.running), longest)
        if not at_best:
            self._cut_short(study)
            return
        free = most - sum(self._tokens_due(request) for request in [*self.running, *new])
        plans = read_together(study.together, slots, free, longest)
        # Somebody's prefill, or another's passes, go first.
        much = 2 * sum(p.length for p in plans) >= sum(p.length for p in at_best)
        if plans and much and self._has_blocks(study.end, *plans):
            study.together.clear()
            for plan in plans:
                study.in_step.append(self._start_pass(study, plan))

    def _tokens_due(self, request: Request) -> int:
        """Tokens of a request that the next step computes, if they fit."""
        due = request.num_tokens_with_spec + request.num_output_placeholders
        return max(1, due - request.num_computed_tokens)

    def read_in_step(self, study: Study, output: SchedulerOutput) -> tuple[str, ...]:
        """The passes that were to be read together, if all are wholly read in this step.

        If not, they go on like any other pass, and the fit that follows is not on-policy. Nor if
        all are as short as a decode: the step might be replayed from a full CUDA graph, in which
        nothing can be fitted.
        """
        passes, study.in_step = tuple(study.in_step), []
        lengths = [len(study.running[p].tokens) if p in study.running else 0 for p in passes]
        whole = lengths == [output.num_scheduled_tokens.get(p) for p in passes]
        return passes if whole and max(lengths, default=0) > 1 + self.num_spec_tokens else ()

    def _may_start(self) -> bool:
        """Nobody waits, and a slot is free."""
        unpaused = self._pause_state == PauseState.UNPAUSED
        if not unpaused or self.waiting or self.kv_holding_waiting:
            return False
        return self._active_requests() + len(self._new_passes()) < self.max_num_active_reqs

    def _active_requests(self) -> int:
        return len(self.running) + self.num_waiting_for_streaming_input

    def _new_passes(self) -> list[Request]:
        """Passes that have been started since the last step."""
        requests = [self.requests[pass_id] for pass_id in self.passes]
        return [r for r in requests if r.status != RequestStatus.RUNNING]

    def _has_blocks(self, end: int, *plans: PassPlan) -> bool:
        """These passes fit beside what users, compactions and running passes will need."""
        groups = 1 + len(self.compaction.blocks.windows)
        blocks = len(self.running) + sum(self._own_blocks(end, plan) for plan in plans)
        blocks += sum(self._blocks_to_come(pass_id) for pass_id in self.passes)
        targets = sum(s.target_blocks for s in self.studies.values())
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return groups * blocks + targets + self._blocks_awaited() <= free

    def _blocks_awaited(self) -> int:
        """Blocks that the first user in the queue asks for, without what the prefix cache has."""
        if not self.waiting:
            return 0
        size = self.compaction.limits.block_size
        needed = self.waiting.peek_request().num_tokens
        if (most := self.compaction.blocks.max_admission_blocks_per_request) is not None:
            needed = min(needed, most * size)
        return self.compaction.planner.blocks_to_grow(needed)

    def _own_blocks(self, end: int, plan: PassPlan) -> int:
        """Of a pass, in each group of layers."""
        size = self.compaction.limits.block_size
        return ceil_div(end + plan.length + self.num_lookahead_tokens, size) - end // size

    def _blocks_to_come(self, pass_id: str) -> int:
        study = self.passes[pass_id]
        held = len(self.compaction.blocks.req_to_blocks[pass_id])
        shared = study.end // self.compaction.limits.block_size
        return max(0, self._own_blocks(study.end, study.running[pass_id]) - (held - shared))

    def _start_pass(self, study: Study, plan: PassPlan) -> str:
        """Returns the id of the request that it becomes."""
        parent, end = study.parent, study.end
        pass_id = f"{parent.request_id}::reference-{study.started}"
        params = SamplingParams(
            max_tokens=max(1, plan.answer_tokens),
            stop_token_ids=self._end_tokens,
            detokenize=False,
            seed=study.started,
            **(STUDY_SAMPLING if plan.answer_tokens else {"temperature": 0}),
        )
        request = Request(
            pass_id,
            [*parent.all_token_ids[:end], *plan.tokens],
            params,
            None,
            client_index=parent.client_index,
            lora_request=parent.lora_request,
            priority=LAST_PRIORITY,
        )
        request.num_computed_tokens = end
        request.prefill_stats = None  # the prefix was no cache hit of a user
        study.started += 1
        study.running[pass_id] = plan
        self.passes[pass_id] = study
        self.requests[pass_id] = request
        self.compaction.blocks.share_prefix(parent.request_id, pass_id, end, study.windows)
        return pass_id

    def _end_pass(self, pass_id: str) -> None:
        """Before its time; the queries that it left stay with its study."""
        self.finish_requests(pass_id, RequestStatus.FINISHED_ABORTED)

    def _make_way(self) -> None:
        """A user waits for a slot or for blocks: the youngest pass gives up its own."""
        if not self.waiting or not self.passes:
            return
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        no_slot = self._active_requests() >= self.max_num_active_reqs
        if no_slot or self._blocks_awaited() > free:
            youngest = next(reversed(self.passes))
            self._cut_short(self.passes[youngest])
            self._end_pass(youngest)

    def sampling_of_pass(self, request: Request, count: int) -> Sampling:
        """What is kept of the ``count`` tokens that a pass computes in this step."""
        pass_id = request.request_id
        return Sampling(
            request.num_computed_tokens - count,
            count,
            self.passes[pass_id].running[pass_id].sample_rate,
            always_from=sys.maxsize,
            owner_of=lambda index: (pass_id, index),
        )

    def shared_prefixes(self, output: SchedulerOutput) -> list[SharedPrefix]:
        """The passes that start in this step behind a partly compacted sequence."""
        started = [new.req_id for new in output.scheduled_new_reqs if new.req_id in self.passes]
        parents = [(p, self.passes[p].parent.request_id) for p in started]
        compacted = self.compaction.blocks.compacted
        return [SharedPrefix(p, parent) for p, parent in parents if parent in compacted]

    # -- vLLM's scheduler -----------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._make_way()
        self._start_passes()
        # Scheduled, and preempted, in this order: users first, and passes are the first victims.
        self.running.sort(key=lambda request: request.request_id in self.passes)
        fresh = [r for r in self._new_passes() if r.status == RequestStatus.WAITING]
        for request in fresh:
            self.waiting.add_request(request)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            if fresh:  # those not admitted stay behind every user, also those yet to come
                self.waiting.remove_requests(fresh)
                self.kv_holding_waiting.remove_requests(fresh)
                self.deferred_waiting.difference_update(fresh)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        hidden = self._ended_passes | self.passes.keys()
        self._ended_passes.clear()
        if hidden:
            for per_client in outputs.values():
                per_client.outputs = [o for o in per_client.outputs if o.request_id not in hidden]
                if per_client.finished_requests:
                    per_client.finished_requests -= hidden
        return outputs

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """Before a request the passes behind it: vLLM collects its victims only once."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        ids = list(self.requests if request_ids is None else request_ids)
        for request_id in ids:
            self.end_study(request_id)
        finished: list[Request] = super().finish_requests(ids, finished_status)
        return finished

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """A pass is never computed again: it ends."""
        study = self.passes.get(request.request_id)
        if study is None:
            super()._preempt_request(request, *args, **kwargs)
        else:
            self._cut_short(study)
            self._end_pass(request.request_id)

    def _free_request_blocks(self, request: Request) -> None:
        """The one exit of requests and of passes."""
        self.end_study(request.request_id)
        study = self.passes.pop(request.request_id, None)
        if study is not None:
            self._ended_passes.add(request.request_id)
            self.reference_tokens += request.num_computed_tokens - study.end
            for source, owners in self.owners_of_passes(study, [request.request_id]).items():
                study.owners.setdefault(source, []).extend(owners)
            plan = study.running.pop(request.request_id)
            if self.compaction.config.on_policy and plan.answer_tokens and not study.cut_short:
                study.together.append(plan.written(request.output_token_ids))
        super()._free_request_blocks(request)

    def owners_of_passes(
        self, study: Study, pass_ids: Iterable[str]
    ) -> dict[str, list[tuple[str, int]]]:
        """By source: owners in the query pool of what running passes have left there so far."""
        owners: dict[str, list[tuple[str, int]]] = {}
        shared = study.end // self.compaction.limits.block_size
        for pass_id in pass_ids:
            blocks = len(self.compaction.blocks.req_to_blocks[pass_id])
            own = [(pass_id, index) for index in range(shared, blocks)]
            owners.setdefault(study.running[pass_id].source, []).extend(own)
        return owners

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.num_running_reqs -= sum(r.request_id in self.passes for r in self.running)
        return stats

    def make_spec_decoding_stats(self, stats: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("request_id") in self.passes:
            return stats
        return super().make_spec_decoding_stats(stats, *args, **kwargs)

    def check_passes(self) -> None:
        """Passes, studies and the query pool agree (debugging, tests).

        Raises:
            AssertionError: naming what does not add up.
        """
        running = {pass_id for study in self.studies.values() for pass_id in study.running}
        if running != set(self.passes) or not running <= set(self.requests):
            raise AssertionError("a pass runs without its study, or is no request")
        if set(self.studies) - {r.request_id for r in self.running}:
            raise AssertionError("a study is about a request that does not run")
        left = {o[0] for s in self.studies.values() for of in s.owners.values() for o in of}
        forgotten = self.compaction.query_pool.named_owners() - left - running
        if forgotten - set(self.compaction.blocks.compacted):
            raise AssertionError("queries of a forgotten pass or sequence are still held")
