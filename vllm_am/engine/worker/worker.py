"""Compaction inside vLLM's workers: allocate its tensors, run its work before each forward pass.

vLLM symbols touched (a mixin over the platform's worker class, selected through
``parallel_config.worker_cls``: ``v1.worker.cpu_worker.CPUWorker`` in worker_cpu.py,
``v1.worker.gpu_worker.Worker`` in worker_cuda.py):
``get_kv_cache_spec``, ``determine_available_memory``, ``initialize_from_config``,
``compile_or_warm_up_model``, ``execute_model``, ``sample_tokens``, ``shutdown``.

``execute_model`` is the one place that precedes everything a step does to the KV cache, on both
model runners: zeroing of blocks, copy-on-write, slot mapping, forward. So blocks freed by a commit
may be handed out and overwritten in the same step.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_pp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.messages import REPORTS_ATTRIBUTE, STEP_ATTRIBUTE, Report
from vllm_am.engine.spec import CompactableAttentionSpec, check_alike
from vllm_am.engine.worker.copying_pass import find_head_weights
from vllm_am.engine.worker.state import WorkerState, fit_bytes

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase as _Base
else:
    _Base = object


class ReportingOutput(AsyncModelRunnerOutput):
    """An async output that carries reports of fits to the scheduler."""

    def __init__(self, output: AsyncModelRunnerOutput, reports: list[Report]) -> None:
        self._output = output
        self._reports = reports

    def get_output(self) -> ModelRunnerOutput:
        return with_reports(self._output.get_output(), self._reports)

    def get_kv_connector_output(self) -> Any:
        """Of the output itself; asked for from vLLM 0.33 on, where it is abstract."""
        return self._output.get_kv_connector_output()


def with_reports(output: Any, reports: list[Report]) -> Any:
    """``output`` carrying the reports; vLLM shares one empty output, so a copy is marked."""
    if isinstance(output, AsyncModelRunnerOutput):
        return ReportingOutput(output, reports)
    output = copy.copy(output)
    setattr(output, REPORTS_ATTRIBUTE, reports)
    return output


class CompactionWorkerMixin(_Base):
    """Adds compaction to a vLLM worker class; see the module docstring."""

    _compaction: WorkerState | None = None
    _unsent_reports: list[Report]

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        peak = EngineLimits.from_vllm_config(self.vllm_config).peak_tokens
        specs = super().get_kv_cache_spec()
        ours = {name: CompactableAttentionSpec.from_spec(s, peak) for name, s in specs.items()}
        check_alike(ours.values())
        return ours

    def determine_available_memory(self) -> int:
        """Leave room for the bias of every slot, page tables, the query pool, step buffers."""
        # Of the layers that are compacted; those of others take no part in any of this.
        specs = [s for s in super().get_kv_cache_spec().values() if type(s) is FullAttentionSpec]
        available: int = super().determine_available_memory()
        if not specs:
            return available
        available -= self.step_buffer_bytes(specs[0])
        if self.device.type == "cuda":  # elsewhere the KV cache's size is set, not found out
            available -= fit_bytes(self.device)
        bytes_per_token = sum(spec.page_size_bytes / spec.block_size for spec in specs)
        heads = sum(spec.num_kv_heads for spec in specs)
        limits = EngineLimits.from_vllm_config(self.vllm_config)
        share = limits.bias_share(heads, bytes_per_token)
        return limits.kv_bytes(available, bytes_per_token, share)

    def step_buffer_bytes(self, spec: Any) -> int:
        """What the attention backend's buffers for a step take, whatever the KV cache's size."""
        return 0

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self._compaction = WorkerState.create(self.vllm_config, kv_cache_config, self.model_runner)
        self._unsent_reports = []

    def compile_or_warm_up_model(self) -> Any:
        """Behind vLLM's own, when everything runs as it will."""
        result = super().compile_or_warm_up_model()
        state = self._compaction
        if state is not None and state.fitting.config.budgets == "auto":
            self._find_head_weights(state)
        return result

    @torch.inference_mode()
    def _find_head_weights(self, state: WorkerState) -> None:
        state.fitting.head_weights = find_head_weights(
            self.execute_model, self.sample_tokens, state, self.vllm_config
        )

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        state = self._compaction
        if state is None:
            return super().execute_model(scheduler_output)
        gone = set(scheduler_output.finished_req_ids) | set(
            scheduler_output.preempted_req_ids or ()
        )
        step = getattr(scheduler_output, STEP_ATTRIBUTE, None)
        reports = state.begin_step(step, gone)
        try:
            output = super().execute_model(scheduler_output)
        finally:
            reports += state.end_step()
        if get_pp_group().is_last_rank:  # the only stage whose output the scheduler sees
            self._unsent_reports += reports
        return self._attach_reports(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._attach_reports(super().sample_tokens(grammar_output))

    def shutdown(self) -> None:
        if self._compaction is not None:
            self._compaction.release(self.vllm_config)
        super().shutdown()

    def _attach_reports(self, output: Any) -> Any:
        """``execute_model`` returns None where ``sample_tokens`` brings the output later."""
        if output is None or self._compaction is None or not self._unsent_reports:
            return output
        reports, self._unsent_reports = self._unsent_reports, []
        return with_reports(output, reports)
