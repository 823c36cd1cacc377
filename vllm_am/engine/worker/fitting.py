"""The compactions that a worker is fitting: slice by slice, with their budgets and outcome.

A slice covers some layers, all of whose heads are fitted as one batch. An on-policy fit is one
slice, whose layers are fitted one by one from inside the forward pass. Everything a fit writes goes
to pages that belong to nobody else, so a failed or forgotten fit needs no clean-up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger

from vllm_am.compaction import METHODS, FitError, compact, evaluate_fit
from vllm_am.compaction.budgets import GLOBAL_SCORE, global_pages, pages_by_shares
from vllm_am.compaction.pages import PagedKV, read_pages, read_segments, write_pages
from vllm_am.compaction.random_queries import random_queries
from vllm_am.compaction.rotate_queries import rotate_queries
from vllm_am.compaction.statistics import AttentionStatistics, attention_statistics, unweighted
from vllm_am.compaction.streaming import to_device
from vllm_am.config import CompactionConfig
from vllm_am.engine.messages import (
    FAILURES,
    INTERNAL_ERROR,
    OUT_OF_MEMORY,
    TOO_LOSSY,
    FitReport,
    FitSlice,
    Segment,
)
from vllm_am.engine.worker.rotary import Rotary

logger = init_logger("vllm.kv_compaction")


#: Statistics of all layers that are kept from the measurement to the fit; larger ones are computed
#: twice.
KEPT_STATISTICS_BYTES = 256 << 20


#: Positions whose queries the fit of the warm-up reads, at most.
WARM_UP_POSITIONS = 64


@dataclass
class FitProgress:
    """One fit on this rank: whose it is, which pages its heads have, its outcome so far."""

    request_id: str
    source: torch.Tensor
    """int64 [heads, n] on the CPU: pages of what is compacted, see :meth:`Fitting.run`."""
    lists: tuple[torch.Tensor, ...] = ()
    """int64 on the CPU: target pages of each (layer, KV head) of this rank."""
    scores: list[torch.Tensor] = field(default_factory=list)
    """float32 [heads, T] of the layers measured so far, for global budgets."""
    statistics: dict[range, AttentionStatistics] = field(default_factory=dict)
    """By the layers of a slice: what was measured, for the fit, where it is small enough."""
    failure: str | None = None
    errors: list[torch.Tensor] = field(default_factory=list)
    """float64 [2] on the device, of the slices so far: sums over heads of output and mass error."""
    heads: int = 0
    seconds: float = 0.0


@dataclass
class Fitting:
    """All fits of one worker.

    Attributes:
        config: the options.
        kv: the pages that are read and written.
        queries: the query pool, [positions, query heads, D] by layer of this rank.
        scale: of the attention scores.
        shares: float64 [heads], this rank's part of a budgets file; None without one.
        rotations: rotary embedding by layer, on the device, None where queries are not rotated.
        chunk_bytes: bound of the largest temporary of a fit.
    """

    config: CompactionConfig
    kv: PagedKV
    queries: list[torch.Tensor]
    scale: float
    shares: torch.Tensor | None
    rotations: list[Rotary | None]
    chunk_bytes: int
    head_weights: torch.Tensor | None = None
    """float64 [heads] on the CPU: what the scores of each head count for beside those of others."""
    running: dict[int, FitProgress] = field(default_factory=dict)
    """By job, from the first slice until the segment is taken over or given up."""

    def warm_up(self, block_ids: Sequence[int]) -> str | None:
        """Fit something tiny in all stages, before anything is served.

        Whatever a fit needs is compiled and loaded here, and not in the middle of serving, where
        everybody would wait for it.

        Args:
            block_ids: some blocks that hold nothing; they hold zeros afterwards. At least 3.

        Returns:
            why it failed; None if it did not.
        """
        target, merged, *source = block_ids
        pages = self.kv.block_pages(block_ids).flatten().to(self.kv.pages.device)
        positions = min(WARM_UP_POSITIONS, len(self.queries[0]))
        generator = torch.Generator(self.kv.pages.device).manual_seed(0)
        self.kv.pages[pages] = torch.randn(
            self.kv.pages[pages].shape,
            generator=generator,
            device=self.kv.pages.device,
            dtype=self.kv.pages.dtype,
        )
        for pool in self.queries:
            pool[:positions].normal_(generator=generator)
        tokens = len(source) * self.kv.block_size
        fit = FitSlice(
            job_id=-1,
            request_id="",
            segment=Segment(0, tokens, self.kv.block_size, (target,)),
            source_block_ids=tuple(source),
            query_slots=np.arange(positions),
            query_shifts=np.full(positions, tokens),
            method=self.config.method,
            part=0,
            parts=2 if self.config.measures_scores else 1,
        )
        progress = FitProgress("", self.kv.block_pages(source))
        self._warm_up(fit, progress)
        if self.config.merge_slots is not None and progress.failure is None:
            lists = pad_sequence(list(progress.lists), batch_first=True, padding_value=-1)
            progress = FitProgress("", lists)
            segment = replace(fit.segment, block_ids=(merged,))
            self._warm_up(replace(fit, segment=segment, merges=True), progress)
        self.kv.pages[pages] = 0
        for pool in self.queries:
            pool[:positions] = 0
        return progress.failure

    def _warm_up(self, fit: FitSlice, progress: FitProgress) -> None:
        for part in range(fit.parts):
            progress.statistics.clear()  # as of a long span, whose fit computes them again
            self._guarded(progress, partial(self._run_slice, replace(fit, part=part), progress))

    def forget(self, request_ids: set[str]) -> None:
        """These requests are gone, and with them their fits and the target pages."""
        for job_id in [j for j, p in self.running.items() if p.request_id in request_ids]:
            del self.running[job_id]

    def take(self, job_id: int) -> tuple[torch.Tensor, ...]:
        """The page lists of a fit that was committed."""
        return self.running.pop(job_id).lists

    def run(self, fit: FitSlice, source_pages: torch.Tensor) -> FitReport | None:
        """Run one slice; the report when it was the last.

        Args:
            source_pages: int64 [heads, n] on the CPU, what is compacted; in a merge -1 behind the
                end of a shorter head's pages.
        """
        if fit.part == 0:
            self.running[fit.job_id] = FitProgress(fit.request_id, source_pages)
        progress = self.running[fit.job_id]
        self._guarded(progress, lambda: self._run_slice(fit, progress))
        return self._finish(fit.job_id) if fit.part + 1 == fit.parts else None

    def begin_on_policy(
        self, fit: FitSlice, source_pages: torch.Tensor
    ) -> tuple[torch.Tensor, ...] | None:
        """Divide the pages of a fit that takes place in the coming forward pass.

        Args:
            source_pages: see :meth:`run`.

        Returns:
            the page lists that its layers are going to be written to; None where it failed.
        """
        assert fit.on_policy is not None
        measured = replace(
            fit,
            query_slots=fit.on_policy.measured_slots,
            query_shifts=fit.on_policy.measured_shifts,
        )
        progress = self.running[fit.job_id] = FitProgress(fit.request_id, source_pages)

        def divide() -> None:
            if self.config.measures_scores:
                for layer in range(len(self.queries)):
                    self._measure(range(layer, layer + 1), measured, progress)
                progress.statistics.clear()  # of other queries than those of the fit
            progress.lists = self._divide_pages(fit, progress)

        self._guarded(progress, divide)
        return None if progress.failure else progress.lists

    def fit_on_policy(self, fit: FitSlice, layer: int) -> None:
        """One layer of it, from the queries that have just arrived there."""
        progress = self.running[fit.job_id]
        layers = range(layer, layer + 1)
        self._guarded(progress, lambda: self._fit_layers(layers, fit, progress))

    def end_on_policy(self, fit: FitSlice) -> FitReport:
        """After the forward pass."""
        progress = self.running[fit.job_id]
        every = len(self.queries) * self.kv.num_kv_heads
        if progress.failure is None and progress.heads != every:
            logger.error(
                "KV compaction: the forward pass fitted %d of %d heads of request %s",
                progress.heads,
                every,
                fit.request_id,
            )
            progress.failure = INTERNAL_ERROR
        return self._finish(fit.job_id)

    def _finish(self, job_id: int) -> FitReport:
        report = self._report(job_id, self.running[job_id])
        if report.failure is not None:
            del self.running[job_id]
        return report

    def _guarded(self, progress: FitProgress, work: Callable[[], None]) -> None:
        """Do some of the work of a fit, unless it has failed already; remember why it fails."""
        if progress.failure is not None:
            return
        started = time.perf_counter()
        try:
            work()
        except FitError as error:
            progress.failure = error.reason
        except (MemoryError, torch.OutOfMemoryError):
            progress.failure = OUT_OF_MEMORY
        except Exception:  # whatever it is, the sequence can go on as it is
            logger.exception("KV compaction: a fit failed unexpectedly")
            progress.failure = INTERNAL_ERROR
        progress.seconds += time.perf_counter() - started

    def _run_slice(self, fit: FitSlice, progress: FitProgress) -> None:
        """Measure or fit the layers of one slice."""
        passes = 2 if self.config.measures_scores else 1
        parts = fit.parts // passes
        part = fit.part % parts
        layers = range(len(self.queries) * part // parts, len(self.queries) * (part + 1) // parts)
        if fit.part < (passes - 1) * parts:
            if layers:  # a stage of a pipeline may have fewer than others
                self._measure(layers, fit, progress)
            return
        if part == 0:
            progress.lists = self._divide_pages(fit, progress)
        if layers:
            self._fit_layers(layers, fit, progress)

    def _measure(self, layers: range, fit: FitSlice, progress: FitProgress) -> None:
        """Statistics of these layers' heads, before the pages of all heads are divided."""
        keys, values, bias = self._source(layers, fit, progress)
        queries, _ = self._reference_queries(layers, fit)
        if queries.shape[1] == 0:
            raise FitError("no-queries", range(len(keys)))
        statistics = attention_statistics(
            keys,
            values,
            queries,
            scale=self.scale,
            key_bias=bias,
            norms=tuple({GLOBAL_SCORE, *METHODS[fit.method].needed_norms}),
            chunk_bytes=self.chunk_bytes,
        )
        scores = statistics.scores[GLOBAL_SCORE]
        progress.scores.append(scores if bias is None else unweighted(scores, bias))
        if statistics.nbytes * len(self.queries) <= KEPT_STATISTICS_BYTES * len(layers):
            progress.statistics[layers] = statistics

    def _divide_pages(self, fit: FitSlice, progress: FitProgress) -> tuple[torch.Tensor, ...]:
        """The pages of the target blocks, shared out among the heads: all of them, each once."""
        pages = self.kv.block_pages(fit.segment.block_ids)  # [heads, blocks]
        most = progress.source.shape[1]
        if pages.shape[1] == most:  # every head keeps everything
            return tuple(pages)
        if progress.scores:
            scores = torch.cat(progress.scores)
            progress.scores.clear()
            bad = ~scores.isfinite().all(dim=1)
            if bool(bad.any()):
                raise FitError("non-finite", bad.nonzero().flatten().tolist())
            counts = global_pages(scores, pages.numel(), self.kv.block_size, self.head_weights)
        elif self.shares is not None:
            counts = pages_by_shares(self.shares, pages.numel(), most)
        else:
            return tuple(pages)
        return pages.flatten().split(counts.tolist())

    def _source(
        self, layers: range, fit: FitSlice, progress: FitProgress
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of what is compacted, [heads, T, D], and in a merge bias [heads, T]."""
        heads = slice(layers.start * self.kv.num_kv_heads, layers.stop * self.kv.num_kv_heads)
        pages = to_device(progress.source[heads], self.kv.pages.device)
        if fit.merges:
            return read_segments(self.kv, pages)
        return *read_pages(self.kv, pages), None

    def _fit_layers(self, layers: range, fit: FitSlice, progress: FitProgress) -> None:
        """Compact the span in these layers into the target pages."""
        keys, values, bias = self._source(layers, fit, progress)
        reference, heldout = self._reference_queries(layers, fit)
        kv_heads = self.kv.num_kv_heads
        lists = progress.lists[layers.start * kv_heads : layers.stop * kv_heads]
        room = torch.tensor([len(ids) for ids in lists]) * self.kv.block_size
        budget = room.clamp(max=keys.shape[1])
        compacted = compact(
            keys,
            values,
            reference,
            budget=budget,
            method=fit.method,
            scale=self.scale,
            key_bias=bias,
            group_size=self.queries[0].shape[1] // kv_heads,
            statistics=progress.statistics.pop(layers, None),
            chunk_bytes=self.chunk_bytes,
        )
        if bool((budget < keys.shape[1]).any()):
            quality = evaluate_fit(
                compacted,
                keys,
                values,
                heldout if heldout.shape[1] else reference,
                scale=self.scale,
                key_bias=bias,
                chunk_bytes=self.chunk_bytes,
            )
            errors = torch.stack([quality.output_error, quality.mass_error])
            progress.errors.append(errors.sum(dim=1, dtype=torch.float64))
        progress.heads += keys.shape[0]
        write_pages(self.kv, lists, compacted)

    def _reference_queries(self, layers: range, fit: FitSlice) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries to fit on and queries to measure on, disjoint, each ``[heads, N, D]``.

        The split is by token position: the queries of one position in a GQA group resemble each
        other too much to be on both sides.
        """
        device = self.kv.pages.device
        slots, shifts = (
            to_device(torch.as_tensor(array), device)
            for array in (fit.query_slots, fit.query_shifts)
        )
        captured = torch.stack([self.queries[layer][slots] for layer in layers])
        sampled = self._rotated(layers, captured, shifts)  # [L, n, Hq, D]
        if (drawn := fit.random_queries) is not None:
            like = to_device(torch.as_tensor(drawn.like), device)
            vectors = [
                random_queries(self.queries[layer][like], drawn.positions, seed=layer)
                for layer in layers
            ]
            sampled = torch.cat([sampled, torch.stack(vectors)], dim=1)
        grouped = sampled.unflatten(2, (self.kv.num_kv_heads, -1))
        grouped = grouped.permute(0, 2, 3, 1, 4).flatten(0, 1)  # [L * H, g, n, D]
        share = self.config.heldout_share
        positions = grouped.shape[2]
        every = max(2, round(1 / share)) if share > 0 else positions + 2
        # Every so many-th is held out. By index: nobody has to count what a mask would choose.
        fitted = torch.arange(positions - positions // every, device=device)
        fitted += fitted // (every - 1)
        held = grouped[:, :, every - 1 :: every]
        return grouped[:, :, fitted].flatten(1, 2), held.flatten(1, 2)

    def _rotated(self, layers: range, queries: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """Queries [L, n, Hq, D] of some layers, each moved by its shift."""
        rotaries = [self.rotations[layer] for layer in layers]
        if any(rotary is not rotaries[0] for rotary in rotaries):
            parts = zip(layers, queries.split(1), strict=True)
            return torch.cat([self._rotated(range(i, i + 1), part, shifts) for i, part in parts])
        if (rotary := rotaries[0]) is None or not len(shifts):
            return queries
        turned = rotate_queries(
            queries.transpose(1, 2),
            shifts,
            rotary.inverse_frequencies,
            interleaved=rotary.interleaved,
        )
        return turned.transpose(1, 2)

    def _report(self, job_id: int, progress: FitProgress) -> FitReport:
        """Agree with the other ranks: one failing head anywhere fails the fit everywhere."""
        votes = [float(progress.failure == reason) for reason in FAILURES]
        errors = [0.0, 0.0]
        if progress.errors:
            errors = torch.stack(progress.errors).sum(dim=0).tolist()
        sums = [*errors, float(progress.heads)]
        total = torch.tensor(votes + sums, dtype=torch.float64)
        for group in (get_tp_group(), get_pp_group()):
            if group.world_size > 1:
                torch.distributed.all_reduce(total, group=group.cpu_group)
        *votes, output_error, mass_error, heads = total.tolist()
        failure = next((r for r, v in zip(FAILURES, votes, strict=True) if v > 0), None)
        output_error /= max(heads, 1.0)
        mass_error /= max(heads, 1.0)
        limit = self.config.max_error
        if failure is None and limit is not None and output_error > limit:
            failure = TOO_LOSSY
        return FitReport(job_id, failure, output_error, mass_error, progress.seconds)
