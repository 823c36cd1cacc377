"""What a worker holds for compaction: the pages with their bias, sampled queries, sequences.

Found by the attention backend through :func:`worker_state`, since vLLM constructs metadata builders
with nothing but the configuration.

vLLM symbol touched: ``v1.worker.gpu.model_states.interface.ModelState.prepare_attn``, wrapped in
the instance of model runner V2: the one for models with states does not say which row is whose.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_am.compaction.pages import PagedKV, page_table
from vllm_am.compaction.streaming import DEFAULT_CHUNK_BYTES
from vllm_am.engine.capabilities import UnsupportedByCompaction
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.messages import (
    Activation,
    Attachment,
    CompactionStep,
    FitSlice,
    Report,
    Segment,
)
from vllm_am.engine.spec import CompactableAttentionSpec
from vllm_am.engine.worker.fitting import Fitting
from vllm_am.engine.worker.prefix_parts import PrefixParts
from vllm_am.engine.worker.rotary import rotaries

logger = init_logger("vllm.kv_compaction")

_states: dict[int, WorkerState] = {}


def engine_key(vllm_config: VllmConfig) -> int:
    """What tells the engines of a process apart.

    vLLM's table of attention layers, of which there is one per model. Not ``instance_id``: where
    the worker is in the process of a served engine, as it is with a single GPU, vLLM gives the
    configuration a new one after the cache was created (``EngineCoreProc._perform_handshakes``).
    """
    return id(vllm_config.compilation_config.static_forward_context)


def worker_state(vllm_config: VllmConfig) -> WorkerState | None:
    """The state of the engine with this configuration in this process, once its cache exists."""
    return _states.get(engine_key(vllm_config))


#: Blocks that the fit of the warm-up reads and writes.
WARM_UP_BLOCKS = 10

#: Temporaries of the largest size that a fit has at a time, at most.
FIT_TEMPORARIES = 8


#: What a slice of a fit takes at its peak, at most: of the longest span, for head sizes up to 256
#: and ratios up to 1/2 (``tests/benchmarks/test_gpu_cost.py``). What needs more may fail for it.
SLICE_BYTES = 11 << 28


def fit_bytes(device: torch.device) -> int:
    """Memory for the temporaries of a fit: on a GPU a share of it, left out of the KV cache."""
    if device.type != "cuda":
        return FIT_TEMPORARIES * DEFAULT_CHUNK_BYTES
    return gpu_fit_bytes(torch.cuda.get_device_properties(device).total_memory)


def gpu_fit_bytes(total: int) -> int:
    """The same of a GPU with so many bytes."""
    return max(SLICE_BYTES, total // 32)


def head_names(layer_names: Iterable[str], vllm_config: VllmConfig) -> list[str]:
    """This rank's KV heads, as budgets files call them: ``L0H0``, by layer and KV head."""
    parallel = vllm_config.parallel_config
    total = vllm_config.model_config.get_total_num_kv_heads()
    local = vllm_config.model_config.get_num_kv_heads(parallel)
    # With more ranks than KV heads each head is held by several ranks.
    first = get_tensor_model_parallel_rank() * total // parallel.tensor_parallel_size
    return [
        f"L{extract_layer_index(name)}H{first + head}"
        for name in layer_names
        for head in range(local)
    ]


def local_shares(
    budgets: str | dict[str, float], layer_names: list[str], vllm_config: VllmConfig
) -> torch.Tensor | None:
    """This rank's part of a budgets file, float64 [layers * KV heads]; None without a file.

    The pages of a rank are divided among its own heads, so only the proportions within a rank
    matter.
    """
    if isinstance(budgets, str):
        return None
    names = head_names(layer_names, vllm_config)
    shares = torch.tensor([budgets[name] for name in names], dtype=torch.float64)
    # A rank none of whose heads has a share holds its pages all the same.
    return shares if bool(shares.any()) else torch.ones_like(shares)


@dataclass(frozen=True)
class CompactedSequence:
    """Where the compacted part of a sequence is: it replaces tokens [start, end)."""

    start: int
    end: int
    lists: tuple[torch.Tensor, ...]
    """int64 on the CPU: the pages of each (layer, KV head), all segments, in order."""
    device: torch.device

    @cached_property
    def table(self) -> torch.Tensor:
        """int32 on the device: ``lists`` as the attention kernels read them."""
        return async_tensor_h2d(page_table(self.lists), device=self.device)

    @cached_property
    def padded(self) -> torch.Tensor:
        """int64 [heads, pages of the longest]: ``lists`` as a matrix, -1 behind a list's end."""
        return pad_sequence(list(self.lists), batch_first=True, padding_value=-1)

    def extended(self, segment_end: int, lists: tuple[torch.Tensor, ...]) -> CompactedSequence:
        """With another segment behind the last one."""
        joined = tuple(torch.cat(pair) for pair in zip(self.lists, lists, strict=True))
        return CompactedSequence(self.start, segment_end, joined, self.device)


@dataclass
class WorkerState:
    """Compaction state of one worker; all tensors on its device."""

    limits: EngineLimits
    layers: dict[str, Any]
    """Attention layers by name, in the order of the model; each has ``kv_cache`` and ``impl``."""
    kv: PagedKV
    """The pages of all layers, with the bias of every slot."""
    queries: dict[str, torch.Tensor]
    """[positions, query heads, D] by layer: the query pool."""
    fitting: Fitting
    runner: Any
    """vLLM's model runner, which knows which request is in which row of the batch."""
    parts: PrefixParts
    """Writes published segments to files, and reads them again."""
    group: int = 0
    """vLLM's KV cache group of these layers."""
    block_sizes: tuple[int, ...] = ()
    """Tokens of a block, by group: each has blocks of its own in the same pool."""
    sequences: dict[str, CompactedSequence] = field(default_factory=dict)
    published: dict[int, tuple[Segment, tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    """Segments that sequences to come may attach to, with their page lists."""
    chains: WeakValueDictionary[tuple[int, ...], CompactedSequence] = field(
        default_factory=WeakValueDictionary
    )
    """By published segments: what begins with these and is in use; one page table for all users."""
    batch_slots: np.ndarray | None = None
    """Slot of each row of the batch that model runner V2 prepares."""
    step: CompactionStep | None = None
    """The step being executed; None in dummy runs, whose rows alias live requests."""

    @classmethod
    def create(
        cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, runner: Any
    ) -> WorkerState:
        """Allocate the bias and the query pool beside a KV cache that was just created.

        Args:
            runner: vLLM's model runner.
        """
        limits = EngineLimits.from_vllm_config(vllm_config)
        context = vllm_config.compilation_config.static_forward_context
        groups = kv_cache_config.kv_cache_groups
        ours = [isinstance(g.kv_cache_spec, CompactableAttentionSpec) for g in groups]
        if not any(ours):
            raise UnsupportedByCompaction(
                "--kv-compaction: a pipeline stage has no layer with full attention: lower "
                "--pipeline-parallel-size"
            )
        group = ours.index(True)  # of several, which the scheduler refuses
        layers = {name: context[name] for name in groups[group].layer_names}
        kv = PagedKV.from_layers([layer.kv_cache for layer in layers.values()], limits.page_slots)
        positions = limits.query_pool_positions(kv_cache_config.num_blocks)
        queries = {
            name: torch.zeros(
                positions,
                layer.impl.num_heads,
                layer.impl.head_size,
                dtype=vllm_config.model_config.dtype,
                device=kv.pages.device,
            )
            for name, layer in layers.items()
        }
        scale = next(iter(layers.values())).impl.scale
        shares = local_shares(limits.config.budgets, list(layers), vllm_config)
        text_config = vllm_config.model_config.hf_text_config
        rotations = rotaries(runner.get_model(), list(layers), text_config, kv.pages.device)
        aside = None
        if limits.pauses_fits:
            # Here: a machine with a GPU need not have what it is made of.
            from vllm_am.engine.worker.interruptible import Interruptible

            aside = Interruptible()
        fitting = Fitting(
            limits.config,
            kv,
            list(queries.values()),
            scale,
            shares,
            rotations,
            fit_bytes(kv.pages.device) // FIT_TEMPORARIES,
            aside=aside,
        )
        names = tuple(head_names(list(layers), vllm_config))
        parts = PrefixParts(kv, names, torch.distributed.get_rank())
        sizes = tuple(each.kv_cache_spec.block_size for each in groups)
        state = cls(limits, layers, kv, queries, fitting, runner, parts, group, sizes)
        _states[engine_key(vllm_config)] = state
        if hasattr(runner, "model_state"):
            state._note_batches(runner.model_state)
        return state

    def _note_batches(self, model_state: Any) -> None:
        """Of model runner V2, which does not tell builders where some layers have a state."""
        prepare = model_state.prepare_attn

        def prepare_attn(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.batch_slots = input_batch.idx_mapping_np
            return prepare(input_batch, *args, **kwargs)

        model_state.prepare_attn = prepare_attn

    @cached_property
    def layer_indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.layers)}

    def row_request_ids(self, req_idx: np.ndarray | None, num_rows: int) -> list[str | None]:
        """The request in each row of the batch being built; None for padding and dummy rows.

        Model runner V1 keeps the row order in its input batch. V2 gives each row's slot in
        ``CommonAttentionMetadata.req_idx``, unpadded, or has it in its batch; in dummy batches that
        is a plain range which aliases live slots, hence the check for a step being executed.
        """
        if self.step is None:
            return [None] * num_rows
        if hasattr(self.runner, "input_batch"):
            ids: list[str | None] = list(self.runner.input_batch.req_ids[:num_rows])
        else:
            slots = self.batch_slots if req_idx is None else req_idx
            assert slots is not None, "the rows of a batch are not known"
            known = self.runner.req_states.index_to_req_id
            ids = [known.get(slot) for slot in slots[:num_rows].tolist()]
        return ids + [None] * (num_rows - len(ids))

    def warm_up(self) -> None:
        """Compile and load what fits need, before anything is served."""
        # Block 0 is vLLM's null block; beside it, nobody owns anything yet.
        num_blocks = next(iter(self.layers.values())).kv_cache.shape[0]
        count = min(WARM_UP_BLOCKS, num_blocks - 1)
        started = time.perf_counter()
        failure = self.fitting.warm_up(range(1, 1 + count)) if count >= 3 else None
        if failure is not None:
            logger.warning("KV compaction: the fit that warms up has failed: %s", failure)
        logger.info("KV compaction: fits warmed up in %.1f s", time.perf_counter() - started)

    def release(self, vllm_config: VllmConfig) -> None:
        """The engine goes: another one may follow in this process."""
        _states.pop(engine_key(vllm_config), None)

    def begin_step(self, step: CompactionStep | None, gone: set[str]) -> list[Report]:
        """Before the forward pass: forget requests, switch sequences over, fit.

        Args:
            step: the scheduler's message, or None.
            gone: requests finished or preempted since the last step.
        """
        self.step = step = step or CompactionStep()
        # First of all: whoever had it fitted may be gone.
        for new in step.published:
            self.published[new.segment_id] = new.segment, self.fitting.take(new.segment_id)
        for request_id in gone:
            self.sequences.pop(request_id, None)
        for job_id in step.cancelled:
            self.fitting.forget(job_id)
        for activation in step.activations:
            self._activate(activation)
        for attachment in step.attached:
            self._attach(attachment)
        for segment_id in step.dropped:
            del self.published[segment_id]
        reports = list(self._transfer(step))
        for shared in step.shared:
            self.sequences[shared.request_id] = self.sequences[shared.parent_id]
        for fit in self.fits_on_policy:
            self._begin_on_policy(fit)
        for fit in step.fits:
            if fit.on_policy is None:
                self.fitting.take_on(fit, self._source_pages(fit))
        return [*reports, *self.fitting.go_on(step.fit_seconds)]

    def _transfer(self, step: CompactionStep) -> Iterator[Report]:
        """Save and load parts of prefixes."""
        for saved in step.saved:
            lists = None if saved.segment_id is None else self.published[saved.segment_id][1]
            yield self.parts.save(saved, lists)
        for loaded in step.loaded:
            lists, report = self.parts.load(loaded)
            if lists is not None and loaded.segment_id is not None:
                self.published[loaded.segment_id] = loaded.segment, lists
            yield report

    def _source_pages(self, fit: FitSlice) -> torch.Tensor:
        """int64 [heads, n] on the CPU: the pages a fit reads, -1 behind the end of a head's."""
        if fit.merges:
            return self.sequences[fit.request_id].padded
        return self.kv.block_pages(fit.source_block_ids)

    @property
    def fits_on_policy(self) -> list[FitSlice]:
        """The fits that take place in the forward pass of the step being executed."""
        fits = [] if self.step is None else self.step.fits
        return [fit for fit in fits if fit.on_policy is not None]

    def fit_on_policy(self, layer_name: str) -> None:
        """In the forward pass, once a layer's queries are in the pool and before it attends."""
        for fit in self.fits_on_policy:
            self.fitting.fit_on_policy(fit, self.layer_indices[layer_name])

    def end_step(self) -> list[Report]:
        """After the forward pass, or after what was raised in it."""
        reports: list[Report] = [self.fitting.end_on_policy(fit) for fit in self.fits_on_policy]
        self.step = None
        return reports

    def _begin_on_policy(self, fit: FitSlice) -> None:
        """The passes attend to the target from its first layer on; where that failed, exactly."""
        lists = self.fitting.begin_on_policy(fit, self._source_pages(fit))
        if lists is None or fit.on_policy is None:
            return
        for pass_id in fit.on_policy.pass_ids:
            self._extend(pass_id, fit.segment, lists)

    def _activate(self, activation: Activation) -> None:
        lists = self.fitting.take(activation.job_id)
        if activation.replaces:
            del self.sequences[activation.request_id]
        self._extend(activation.request_id, activation.segment, lists)

    def _attach(self, attachment: Attachment) -> None:
        request_id, ids = attachment.request_id, attachment.segment_ids
        begins = request_id not in self.sequences
        if begins and (chain := self.chains.get(ids)) is not None:
            self.sequences[request_id] = chain
            return
        for segment_id in ids:
            self._extend(request_id, *self.published[segment_id])
        if begins:
            self.chains[ids] = self.sequences[request_id]

    def _extend(self, request_id: str, segment: Segment, lists: tuple[torch.Tensor, ...]) -> None:
        """From now on the sequence attends to the segment in place of its tokens."""
        sequence = self.sequences.get(request_id)
        if sequence is None:
            sequence = CompactedSequence(segment.start, segment.end, lists, self.kv.pages.device)
        else:
            sequence = sequence.extended(segment.end, lists)
        self.sequences[request_id] = sequence
