"""The compactions that a worker is fitting: slice by slice, with their budgets and outcome.

A slice covers some heads, which are measured or fitted as one batch. An on-policy fit is one slice,
whose layers are fitted one by one from inside the forward pass. Everything a fit writes goes
to pages that belong to nobody else, so a failed or forgotten fit needs no clean-up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.logger import init_logger

from vllm_am.compaction import METHODS, FitError, compact, evaluate_fit
from vllm_am.compaction.budgets import GLOBAL_SCORE, global_pages, pages_by_shares
from vllm_am.compaction.pages import PagedKV, read_pages, read_segments, write_pages
from vllm_am.compaction.statistics import AttentionStatistics, attention_statistics, unweighted
from vllm_am.compaction.streaming import to_device
from vllm_am.config import CompactionConfig
from vllm_am.engine.limits import KEPT_STATISTICS_BYTES
from vllm_am.engine.messages import (
    FAILURES,
    INTERNAL_ERROR,
    OUT_OF_MEMORY,
    TOO_LOSSY,
    FitReport,
    FitSlice,
    FitTime,
    HeadRange,
    Report,
    Segment,
    SliceReport,
)
from vllm_am.engine.worker.head_queries import head_queries
from vllm_am.engine.worker.ranks import summed_over_ranks
from vllm_am.engine.worker.rotary import Rotary
from vllm_am.engine.worker.stopwatch import Stopwatch

if TYPE_CHECKING:
    from vllm_am.engine.worker.interruptible import Interruptible

logger = init_logger("vllm.kv_compaction")


#: Positions whose queries the fit of the warm-up reads, at most.
WARM_UP_POSITIONS = 64


@dataclass
class FitProgress:
    """One fit on this rank: which pages its heads have, its outcome so far."""

    source: torch.Tensor
    """int64 [heads, n] on the CPU: pages of what is compacted, see :meth:`Fitting.run`."""
    lists: tuple[torch.Tensor, ...] = ()
    """int64 on the CPU: target pages of each (layer, KV head) of this rank."""
    scores: list[torch.Tensor] = field(default_factory=list)
    """float32 [heads, T] of the heads measured so far, for global budgets."""
    statistics: dict[range, AttentionStatistics] = field(default_factory=dict)
    """By the heads of a slice: what was measured, for their fit, where it is small enough."""
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
    aside: Interruptible | None = None
    """What fits are put aside with when their time is up; None where they are not."""
    waiting: deque[tuple[FitSlice, torch.Tensor]] = field(default_factory=deque)
    """Slices that are not done yet, the first perhaps in part, with their source's pages."""
    stopwatch: Stopwatch = field(init=False)
    running: dict[int, FitProgress] = field(default_factory=dict)
    """By job, from the first slice until the segment is taken over or given up."""

    def __post_init__(self) -> None:
        self._clock = time.perf_counter if self.aside is None else self.aside.clock
        self.stopwatch = Stopwatch(self.kv.pages.device, self._clock)

    @property
    def heads(self) -> int:
        """All that are compacted on this rank."""
        return len(self.queries) * self.kv.num_kv_heads

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
            heads=HeadRange(0, self.heads, self.heads),
        )
        progress = FitProgress(self.kv.block_pages(source))
        self._warm_up(fit, progress)
        if self.config.merge_slots is not None and progress.failure is None:
            lists = pad_sequence(list(progress.lists), batch_first=True, padding_value=-1)
            progress = FitProgress(lists)
            segment = replace(fit.segment, block_ids=(merged,))
            self._warm_up(replace(fit, segment=segment, merges=True), progress)
        self.kv.pages[pages] = 0
        for pool in self.queries:
            pool[:positions] = 0
        return progress.failure

    def _warm_up(self, fit: FitSlice, progress: FitProgress) -> None:
        for measures in (True, False) if self.config.measures_scores else (False,):
            progress.statistics.clear()  # as of a long span, whose fit computes them again
            each = replace(fit, measures=measures)
            self._guarded(progress, partial(self._run_slice, each, progress))

    def forget(self, job_id: int) -> None:
        """A fit that was cancelled, and with it the target pages."""
        self.running.pop(job_id, None)
        if self.aside is not None and self.aside.busy and self.waiting[0][0].job_id == job_id:
            self.aside.cancel()
        self.waiting = deque(each for each in self.waiting if each[0].job_id != job_id)

    def take(self, job_id: int) -> tuple[torch.Tensor, ...]:
        """The page lists of a fit that was committed."""
        return self.running.pop(job_id).lists

    def take_on(self, fit: FitSlice, source_pages: torch.Tensor) -> None:
        """A slice that is to be run, behind all others.

        Args:
            source_pages: int64 [heads, n] on the CPU, what is compacted; in a merge -1 behind the
                end of a shorter head's pages.
        """
        self.waiting.append((fit, source_pages))

    def go_on(self, seconds: float) -> Iterator[Report]:
        """Run what was taken on; what there is to say of it.

        Args:
            seconds: after which the rest is put aside, where that is possible.
        """
        if not self.waiting and not self.stopwatch.running:
            return
        started = time.perf_counter()
        until = started + seconds
        while self.waiting:
            fit, source_pages = self.waiting[0]
            if self.aside is None:
                self._run(fit, source_pages)
            else:
                if not self.aside.busy:
                    self.aside.begin(partial(self._run, fit, source_pages))
                if not self.aside.go_on(until):
                    break
            self.waiting.popleft()
            if not fit.measures and fit.heads.end == fit.heads.of:
                yield self._finish(fit.job_id)
            if self.aside is not None and time.perf_counter() >= until:
                break
        taken = time.perf_counter() - started
        finished = list(self.stopwatch.finished())
        if self.kv.pages.device.type == "cuda":  # what the host has queued takes the device longer
            taken = sum(report.seconds for report in finished)
        yield from finished
        yield FitTime(taken)

    def _run(self, fit: FitSlice, source_pages: torch.Tensor) -> None:
        """One slice."""
        if fit.heads.begin == 0 and fit.measures == self.config.measures_scores:
            self.running[fit.job_id] = FitProgress(source_pages)
        progress = self.running[fit.job_id]
        divided, started = bool(progress.lists), self.stopwatch.start()
        self._guarded(progress, lambda: self._run_slice(fit, progress))
        slots = None
        if progress.lists and not divided:
            slots = tuple(len(pages) * self.kv.page_size for pages in progress.lists)
        work = 0.0 if progress.failure else fit.work  # of one that failed nothing is learned
        report = SliceReport(fit.job_id, fit.measures, fit.heads, work, 0.0, slots)
        self.stopwatch.stop(started, report)

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
        progress = self.running[fit.job_id] = FitProgress(source_pages)

        def divide() -> None:
            if self.config.measures_scores:
                for layer in range(len(self.queries)):
                    self._measure(self._heads_of(layer), measured, progress)
                progress.statistics.clear()  # of other queries than those of the fit
            progress.lists = self._divide_pages(fit, progress)

        self._guarded(progress, divide)
        return None if progress.failure else progress.lists

    def fit_on_policy(self, fit: FitSlice, layer: int) -> None:
        """One layer of it, from the queries that have just arrived there."""
        progress = self.running[fit.job_id]
        heads = self._heads_of(layer)
        self._guarded(progress, lambda: self._fit_heads(heads, fit, progress))

    def _heads_of(self, layer: int) -> range:
        """Those of one layer of this rank."""
        return range(layer * self.kv.num_kv_heads, (layer + 1) * self.kv.num_kv_heads)

    def end_on_policy(self, fit: FitSlice) -> FitReport:
        """After the forward pass."""
        progress = self.running[fit.job_id]
        if progress.failure is None and progress.heads != self.heads:
            logger.error(
                "KV compaction: the forward pass fitted %d of %d heads of request %s",
                progress.heads,
                self.heads,
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
        started = self._clock()
        try:
            work()
        except FitError as error:
            progress.failure = error.reason
        except (MemoryError, torch.OutOfMemoryError):
            progress.failure = OUT_OF_MEMORY
        except Exception:  # whatever it is, the sequence can go on as it is
            logger.exception("KV compaction: a fit failed unexpectedly")
            progress.failure = INTERNAL_ERROR
        progress.seconds += self._clock() - started

    def _run_slice(self, fit: FitSlice, progress: FitProgress) -> None:
        """Measure or fit the heads of one slice; a stage of a pipeline may have none of them."""
        heads = fit.heads.among(self.heads)
        if fit.measures:
            if heads:
                self._measure(heads, fit, progress)
            if fit.heads.end == fit.heads.of:
                progress.lists = self._divide_pages(fit, progress)
            return
        if not progress.lists:
            progress.lists = self._divide_pages(fit, progress)
        if heads:
            self._fit_heads(heads, fit, progress)

    def _measure(self, heads: range, fit: FitSlice, progress: FitProgress) -> None:
        """Statistics of these heads, before the pages of all heads are divided."""
        keys, values, bias = self._source(heads, fit, progress)
        queries, _ = self._reference_queries(heads, fit)
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
        if statistics.nbytes * self.heads <= KEPT_STATISTICS_BYTES * len(heads):
            progress.statistics[heads] = statistics

    def _measured(self, heads: range, progress: FitProgress) -> AttentionStatistics | None:
        """What was kept of these heads' measurement; of what is not needed again, nothing is."""
        parts = []
        for kept, statistics in list(progress.statistics.items()):
            begin, end = max(kept.start, heads.start), min(kept.stop, heads.stop)
            if begin < end:
                parts.append(statistics.heads(slice(begin - kept.start, end - kept.start)))
            if kept.stop <= heads.stop:
                del progress.statistics[kept]
        if sum(len(part.lse) for part in parts) < len(heads):
            return None
        return AttentionStatistics.joined(parts)

    def _divide_pages(self, fit: FitSlice, progress: FitProgress) -> tuple[torch.Tensor, ...]:
        """The pages of the target blocks, shared out among the heads: all of them, each once."""
        pages = self.kv.block_pages(fit.segment.block_ids)  # [heads, pages]
        most = progress.source.shape[1]
        if pages.shape[1] == most:  # every head keeps everything
            return tuple(pages)
        if progress.scores:
            scores = torch.cat(progress.scores)
            progress.scores.clear()
            bad = ~scores.isfinite().all(dim=1)
            if bool(bad.any()):
                raise FitError("non-finite", bad.nonzero().flatten().tolist())
            counts = global_pages(scores, pages.numel(), self.kv.page_size, self.head_weights)
        elif self.shares is not None:
            counts = pages_by_shares(self.shares, pages.numel(), most)
        else:
            return tuple(pages)
        return pages.flatten().split(counts.tolist())

    def _source(
        self, heads: range, fit: FitSlice, progress: FitProgress
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of what is compacted, [heads, T, D], and in a merge bias [heads, T]."""
        pages = progress.source[heads.start : heads.stop]
        pages = to_device(pages, self.kv.pages.device)
        if fit.merges:
            return read_segments(self.kv, pages)
        return *read_pages(self.kv, pages), None

    def _fit_heads(self, heads: range, fit: FitSlice, progress: FitProgress) -> None:
        """Compact the span in these heads into the target pages."""
        keys, values, bias = self._source(heads, fit, progress)
        reference, heldout = self._reference_queries(heads, fit)
        lists = progress.lists[heads.start : heads.stop]
        room = torch.tensor([len(ids) for ids in lists]) * self.kv.page_size
        budget = room.clamp(max=keys.shape[1])
        compacted = compact(
            keys,
            values,
            reference,
            budget=budget,
            method=fit.method,
            scale=self.scale,
            key_bias=bias,
            group_size=self.queries[0].shape[1] // self.kv.num_kv_heads,
            statistics=self._measured(heads, progress),
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

    def _reference_queries(self, heads: range, fit: FitSlice) -> tuple[torch.Tensor, torch.Tensor]:
        return head_queries(
            self.queries,
            self.rotations,
            heads,
            fit,
            kv_heads=self.kv.num_kv_heads,
            heldout_share=self.config.heldout_share,
        )

    def _report(self, job_id: int, progress: FitProgress) -> FitReport:
        """Agree with the other ranks: one failing head anywhere fails the fit everywhere."""
        votes = [float(progress.failure == reason) for reason in FAILURES]
        errors = [0.0, 0.0]
        if progress.errors:
            errors = torch.stack(progress.errors).sum(dim=0).tolist()
        sums = [*errors, float(progress.heads)]
        total = summed_over_ranks(torch.tensor(votes + sums, dtype=torch.float64))
        *votes, output_error, mass_error, heads = total.tolist()
        failure = next((r for r, v in zip(FAILURES, votes, strict=True) if v > 0), None)
        output_error /= max(heads, 1.0)
        mass_error /= max(heads, 1.0)
        limit = self.config.max_error
        if failure is None and limit is not None and output_error > limit:
            failure = TOO_LOSSY
        return FitReport(job_id, failure, output_error, mass_error, progress.seconds)
