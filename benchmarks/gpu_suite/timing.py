"""Timing on a GPU: medians of paired runs, and the machine's measured ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]

#: Runs in one graph, of which the mean is taken: a replay has costs of its own.
_COPIES = 10


def device() -> torch.device:
    """The GPU; the CPU where there is none (smoke runs of the suite itself)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Work) -> float:
    """One run, by CUDA events on a GPU: what the host takes to launch is in it."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _flush() -> torch.Tensor:
    """What is larger than any L2 cache: overwritten before each run, because serving never finds
    its KV cache there."""
    return torch.empty(32 << 20, dtype=torch.int32, device=device())


def paired(works: Mapping[str, Work], repeats: int = 15, warmups: int = 3) -> dict[str, float]:
    """Median seconds of each; the runs alternate, so that clocks and heat treat all alike.

    For work that waits for the device in between, or is long: see :func:`replayed`.
    """
    flush = _flush()
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warmups + repeats):
        for name, work in works.items():
            if torch.cuda.is_available():
                flush.zero_()
            elapsed = seconds(work)
            if turn >= warmups:
                times[name].append(elapsed)
    return {name: statistics.median(runs) for name, runs in times.items()}


def replayed(works: Mapping[str, Work], repeats: int = 15) -> dict[str, float]:
    """Median seconds of each on the device alone, as in a CUDA graph of a decode step.

    Launching a kernel from Python takes longer than many kernels run. So each work is captured some
    times over, the L2 cache overwritten before each, and the overwriting alone is taken off.
    """
    if not torch.cuda.is_available():
        return paired(works, repeats=repeats)
    flush = _flush()
    captured = {name: _captured(flush, work) for name, work in {"": lambda: None, **works}.items()}
    times = paired({name: graph.replay for name, graph in captured.items()}, repeats)
    alone = times.pop("")
    return {name: (elapsed - alone) / _COPIES for name, elapsed in times.items()}


def _captured(flush: torch.Tensor, work: Work) -> torch.cuda.CUDAGraph:
    """``_COPIES`` runs of the work, each behind a flush."""
    work()  # what is compiled at the first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_COPIES):
            flush.zero_()
            work()
    return graph


def matmul_ceiling(size: int = 8192) -> float:
    """bf16 matrix-product FLOP/s of this machine, measured."""
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / paired({"matmul": lambda: a @ b}, repeats=9)["matmul"]


def copy_bandwidth(size: int = 4 << 30) -> float:
    """Bytes per second read while copying (as many are written), measured."""
    source = torch.empty(size // 4, dtype=torch.int32, device=device())
    target = torch.empty_like(source)
    elapsed = paired({"copy": lambda: target.copy_(source)}, repeats=9)["copy"]
    return 2 * size / elapsed
