"""Throughput with and without compaction against the size of the KV pool: gains and losses.

    python -m benchmarks.memory_bound

Where the pool holds all sequences, compaction can only cost; where it does not, stock vLLM serves
them one after the other, and compaction serves more of them at once. Every pool size is one run of
stock vLLM and one of ours with each kind of threshold (tokens of a sequence, and a share of the
pool, which compacts only under pressure), side by side on the same requests (random tokens, dummy
weights: nothing here is about quality, which ``benchmarks/quality`` measures).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer

from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.engine_run import EngineCase, EngineResult, run_engine
from benchmarks.gpu_suite.models import QWEN3_4B, TINY, qwen3
from benchmarks.gpu_suite.report import Report, Row


@dataclass(frozen=True)
class Workload:
    """What is served: ``requests`` at once, and how large the pools are (in whole contexts)."""

    model: dict[str, Any]
    requests: int
    prompt_tokens: int
    output_tokens: int
    pools: tuple[int, ...]
    ratio: float
    thresholds: tuple[int | str, ...]
    block_size: int
    engine: dict[str, Any]
    warmups: int | None = None
    """Requests of the run before the measured one; None for as many."""


#: A GPU's: 32k-token contexts of Qwen3-4B, 20x. The paper's and the product's case.
GPU = Workload(
    model=QWEN3_4B,
    requests=24,
    prompt_tokens=32_768,
    output_tokens=512,
    pools=(2, 4, 8, 16),
    ratio=0.05,
    thresholds=(4096, "80%"),
    block_size=16,
    engine={"gpu_memory_utilization": 0.9},
)

#: Of it, what fits two minutes.
GPU_PAIR = replace(GPU, requests=8, pools=(2,), thresholds=(4096,), warmups=1)

#: Something two CPU cores can do in minutes. Weights are small beside the KV cache, as on a GPU.
#: The model is so small that a fit costs as much as some hundred of its tokens: answers are long.
CPU = Workload(
    model=qwen3(
        layers=4,
        hidden=128,
        intermediate=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        vocabulary=512,
        positions=8192,
        dtype="float32",
    ),
    requests=12,
    prompt_tokens=2000,
    output_tokens=1500,
    pools=(2, 4, 14),
    ratio=0.05,
    thresholds=(1000, "80%"),
    block_size=32,
    engine={"enforce_eager": True, "dtype": "float32", "gpu_memory_utilization": 0.2},
    warmups=1,
)

#: For tests.
SMOKE = replace(
    CPU,
    model=TINY,
    requests=3,
    prompt_tokens=600,
    output_tokens=8,
    pools=(2,),
    thresholds=(256, "30%"),
)


def workload(smoke: bool) -> Workload:
    """The one for this machine."""
    if smoke:
        return SMOKE
    return GPU if torch.cuda.is_available() else CPU


def rows_of(load: Workload) -> Iterator[Row]:
    """Per pool size: stock vLLM, and ours with each threshold, with its ratios to stock."""
    options = [{"ratio": load.ratio, "threshold": threshold} for threshold in load.thresholds]
    context = load.prompt_tokens + load.output_tokens
    for pool in load.pools:
        case = EngineCase(
            model=load.model,
            requests=load.requests,
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.output_tokens,
            warmups=load.warmups,
            engine={
                "max_model_len": context + 64,
                "max_num_seqs": load.requests,
                "block_size": load.block_size,
                # vLLM refuses a pool that cannot hold one sequence of max_model_len.
                "num_gpu_blocks_override": pool * -(-(context + 64) // load.block_size) + 1,
                **load.engine,
            },
        )
        yield from compare(case, *options, **{"pool, contexts": pool})


def compare(case: EngineCase, *options: dict[str, Any], **columns: object) -> Iterator[Row]:
    """Stock vLLM and ours with each of the options, one after the other, and the ratios."""
    stock = run_engine(case)
    yield _row(case, stock, **columns)
    for each in options:
        ours_case = replace(case, kv_compaction=each)
        ours = run_engine(ours_case)
        row = _row(ours_case, ours, **columns)
        speed = ours.output_tokens_per_second / stock.output_tokens_per_second
        row["ours / stock, tokens/s"] = speed
        row["ours / stock, at once"] = ours.most_running / stock.most_running
        yield row


def _row(case: EngineCase, result: EngineResult, **columns: object) -> Row:
    return {
        **columns,
        "engine": "stock" if case.kv_compaction is None else "compaction",
        "threshold": (case.kv_compaction or {}).get("threshold", ""),
        "requests": case.requests,
        "prompt tokens": case.prompt_tokens,
        "output tokens": case.output_tokens,
        "tokens/s": result.output_tokens_per_second,
        "most at once": result.most_running,
        "preemptions": result.preemptions,
        "compactions": result.compactions,
        "failures": result.failures,
    }


def report(smoke: bool) -> Report:
    """The table, with its notes."""
    return report_of(workload(smoke))


def pair(smoke: bool) -> Report:
    """The same of one small pool and one threshold."""
    return report_of(replace(SMOKE, thresholds=(256,)) if smoke else GPU_PAIR)


def report_of(load: Workload) -> Report:
    """The table of a workload."""
    notes = [
        f"Compacted to {load.ratio:g}; `threshold`: tokens of a sequence, or share of the pool.",
        "Random tokens and dummy weights: no statement about quality, which `benchmarks/quality` "
        "measures.",
        "`most at once`: sequences in the batch together.",
    ]
    title = "Throughput against the size of the KV pool"
    return Report("memory_bound", title, rows_of(load), notes)


def main(
    out: Folder = None,
    record: Record = False,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, to try the code.")] = False,
) -> None:
    """Measure, write ``memory_bound.{csv,md,png}``."""
    from benchmarks.gpu_suite.plot import plot_memory_bound

    folder = result_path(out, record)
    table = report(smoke)
    table.write(folder)
    plot_memory_bound(folder / "memory_bound.csv")
    typer.echo((folder / "memory_bound.md").read_text())
    typer.echo(written(folder, "memory_bound.md", "memory_bound.csv", "memory_bound.png"))


if __name__ == "__main__":
    typer.run(main)
