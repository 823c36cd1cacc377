"""What a worker holds for compaction: bias of every slot, sampled queries, compacted sequences.

Found by the attention backend through :func:`worker_state`, since vLLM constructs metadata builders
with nothing but the configuration.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_am.compaction import FitError, compact, evaluate_fit
from vllm_am.compaction.write_pages import read_span, write_pages
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.messages import (
    FAILURES,
    INTERNAL_ERROR,
    OUT_OF_MEMORY,
    Activation,
    CompactionStep,
    FitReport,
    FitSlice,
)

logger = init_logger("vllm.kv_compaction")

_states: dict[str, WorkerState] = {}


def worker_state(vllm_config: VllmConfig) -> WorkerState | None:
    """The state of the engine with this configuration in this process, once its cache exists."""
    return _states.get(vllm_config.instance_id)


@dataclass(frozen=True)
class CompactedSequence:
    """Where the compacted part of a sequence is: it replaces tokens [start, end)."""

    start: int
    end: int
    block_ids: torch.Tensor
    """int64 [P]: blocks of all segments, in order; unused slots have bias -inf."""


@dataclass
class FitProgress:
    """Outcome of the slices of one fit so far, on this rank."""

    failure: str | None = None
    output_error: float = 0.0
    mass_error: float = 0.0
    heads: int = 0
    seconds: float = 0.0


@dataclass
class WorkerState:
    """Compaction state of one worker; all tensors on its device."""

    limits: EngineLimits
    layers: dict[str, Any]
    """Attention layers by name, in the order of the model; each has ``kv_cache`` and ``impl``."""
    bias: dict[str, torch.Tensor]
    """float32 [num_blocks, H, block_size] by layer."""
    queries: dict[str, torch.Tensor]
    """[positions, query heads, D] by layer: the query pool."""
    sequences: dict[str, CompactedSequence] = field(default_factory=dict)
    fits: dict[int, tuple[str, FitProgress]] = field(default_factory=dict)
    step: CompactionStep | None = None
    """The step being executed; None in dummy runs, whose rows alias live requests."""
    runner: Any = None
    """vLLM's model runner, which knows which request is in which row of the batch."""

    @classmethod
    def create(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> WorkerState:
        """Allocate the bias and the query pool beside a KV cache that was just created."""
        limits = EngineLimits.from_vllm_config(vllm_config)
        context = vllm_config.compilation_config.static_forward_context
        names = [n for group in kv_cache_config.kv_cache_groups for n in group.layer_names]
        layers = {name: context[name] for name in names}
        positions = limits.query_pool_positions(kv_cache_config.num_blocks)
        bias, queries = {}, {}
        for name, layer in layers.items():
            cache = layer.kv_cache
            bias[name] = torch.zeros(cache.shape[:3], dtype=torch.float32, device=cache.device)
            queries[name] = torch.zeros(
                positions,
                layer.impl.num_heads,
                layer.impl.head_size,
                dtype=vllm_config.model_config.dtype,
                device=cache.device,
            )
        state = cls(limits, layers, bias, queries)
        _states[vllm_config.instance_id] = state
        return state

    def row_request_ids(self, req_idx: np.ndarray | None, num_rows: int) -> list[str | None]:
        """The request in each row of the batch being built; None for padding and dummy rows.

        Model runner V1 keeps the row order in its input batch. V2 gives each row's slot in
        ``CommonAttentionMetadata.req_idx``, unpadded; in dummy batches that is a plain range which
        aliases live slots, hence the check for a step being executed.
        """
        if self.step is None:
            return [None] * num_rows
        if hasattr(self.runner, "input_batch"):
            ids: list[str | None] = list(self.runner.input_batch.req_ids[:num_rows])
        else:
            slots = [] if req_idx is None else req_idx.tolist()
            ids = [self.runner.req_states.index_to_req_id.get(slot) for slot in slots[:num_rows]]
        return ids + [None] * (num_rows - len(ids))

    def release(self, vllm_config: VllmConfig) -> None:
        """The engine goes: another one may follow in this process."""
        _states.pop(vllm_config.instance_id, None)

    # -- one step -------------------------------------------------------------------------------

    def begin_step(self, step: CompactionStep | None, gone: set[str]) -> list[FitReport]:
        """Before the forward pass: forget requests, switch sequences over, fit.

        Args:
            step: the scheduler's message, or None.
            gone: requests finished or preempted since the last step.
        """
        for request_id in gone:
            self.sequences.pop(request_id, None)
        for job_id in [j for j, (request_id, _) in self.fits.items() if request_id in gone]:
            del self.fits[job_id]
        self.step = step = step or CompactionStep()
        for activation in step.activations:
            self._activate(activation)
        return [report for fit in step.fits if (report := self._fit(fit)) is not None]

    def _activate(self, activation: Activation) -> None:
        segments = activation.segments
        device = next(iter(self.bias.values())).device
        blocks = [b for segment in segments for b in segment.block_ids]
        self.sequences[activation.request_id] = CompactedSequence(
            segments[0].start, segments[-1].end, torch.tensor(blocks, device=device)
        )

    # -- fit ------------------------------------------------------------------------------------

    def _fit(self, fit: FitSlice) -> FitReport | None:
        """Run one slice; the report when it was the last."""
        if fit.part == 0:
            self.fits[fit.job_id] = (fit.request_id, FitProgress())
        _, progress = self.fits[fit.job_id]
        names = list(self.layers)
        first, last = (len(names) * p // fit.parts for p in (fit.part, fit.part + 1))
        started = time.perf_counter()
        for name in names[first:last]:
            if progress.failure is not None:
                break
            progress.failure = self._fit_layer(name, fit, progress)
        progress.seconds += time.perf_counter() - started
        if fit.part + 1 < fit.parts:
            return None
        del self.fits[fit.job_id]
        return self._report(fit.job_id, progress)

    def _fit_layer(self, name: str, fit: FitSlice, progress: FitProgress) -> str | None:
        """Compact one layer's span into the target blocks; why it failed, or None."""
        try:
            self._compact_layer(name, fit, progress)
        except FitError as error:
            return error.reason
        except (MemoryError, torch.OutOfMemoryError):
            return OUT_OF_MEMORY
        except RuntimeError:
            logger.exception("KV compaction: the fit of layer %s failed unexpectedly", name)
            return INTERNAL_ERROR
        return None

    def _compact_layer(self, name: str, fit: FitSlice, progress: FitProgress) -> None:
        layer = self.layers[name]
        cache, scale = layer.kv_cache, layer.impl.scale
        keys, values = read_span(cache, torch.tensor(fit.source_block_ids, device=cache.device))
        reference, heldout = self._reference_queries(name, fit, keys.shape[0])
        compacted = compact(
            keys, values, reference, budget=fit.segment.slots, method=fit.method, scale=scale
        )
        if fit.segment.slots < keys.shape[1]:
            quality = evaluate_fit(
                compacted,
                keys,
                values,
                heldout if heldout.shape[1] else reference,
                scale=scale,
            )
            progress.output_error += float(quality.output_error.sum())
            progress.mass_error += float(quality.mass_error.sum())
        progress.heads += keys.shape[0]
        target = torch.tensor(fit.segment.block_ids, device=cache.device)
        write_pages(cache, self.bias[name], target, compacted)

    def _reference_queries(
        self, name: str, fit: FitSlice, kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries to fit on and queries to measure on, disjoint, each ``[H, N, D]``.

        The split is by token position: the queries of one position in a GQA group resemble each
        other too much to be on both sides.
        """
        pool = self.queries[name]
        sampled = pool[torch.as_tensor(fit.query_slots, device=pool.device)]  # [n, Hq, D]
        grouped = sampled.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [H, g, n, D]
        share = self.limits.config.heldout_share
        every = max(2, round(1 / share)) if share > 0 else grouped.shape[2] + 2
        index = torch.arange(grouped.shape[2], device=pool.device)
        held = index % every == every - 1
        return grouped[:, :, ~held].flatten(1, 2), grouped[:, :, held].flatten(1, 2)

    def _report(self, job_id: int, progress: FitProgress) -> FitReport:
        """Agree with the other ranks: one failing head anywhere fails the fit everywhere."""
        votes = [float(progress.failure == reason) for reason in FAILURES]
        sums = [progress.output_error, progress.mass_error, float(progress.heads)]
        total = torch.tensor(votes + sums, dtype=torch.float64)
        for group in (get_tp_group(), get_pp_group()):
            if group.world_size > 1:
                torch.distributed.all_reduce(total, group=group.cpu_group)
        *votes, output_error, mass_error, heads = total.tolist()
        failure = next((r for r, v in zip(FAILURES, votes, strict=True) if v > 0), None)
        heads = max(heads, 1.0)
        return FitReport(
            job_id, failure, output_error / heads, mass_error / heads, progress.seconds
        )
