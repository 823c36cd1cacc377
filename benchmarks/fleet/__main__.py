"""The command: ``python -m benchmarks.fleet``."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.fleet.costs import gpu_costs, shape_of
from benchmarks.fleet.simulate import EngineShape, Simulation
from benchmarks.fleet.traces import TRAFFIC
from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.models import QWEN3_4B
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.plots import plot_lines
from vllm_am.engine.worker.state import gpu_fit_bytes
from vllm_am.plan import BATCHED_TOKENS, ITEMSIZE, make_plan

GIB = 2**30
#: GiB of a GPU; what of it is vLLM's.
MEMORY, UTILIZATION = (24, 40, 80, 141), 0.9
RATIOS = ("10x", "20x", "50x")
LONGEST = 131_072
MAX_NUM_SEQS = 256
THRESHOLD = 4096


def rows_of(count: int, seed: int, dollars: float) -> Iterator[Row]:
    """A row for each traffic, memory and ratio."""
    shape = shape_of(QWEN3_4B)
    costs = gpu_costs(shape)
    for traffic in TRAFFIC.values():
        requests = traffic.requests(count, seed, LONGEST)
        for memory in MEMORY:
            available = int(UTILIZATION * memory * GIB) - shape.weight_bytes
            exact: float | None = None
            for ratio in ("", *RATIOS):
                plan = make_plan(
                    shape,
                    available,
                    context=LONGEST,
                    itemsize=ITEMSIZE,
                    block_size=16,
                    options={"ratio": ratio or "10x", "threshold": THRESHOLD},
                    fit_bytes=gpu_fit_bytes(memory * GIB),
                )
                limits = plan.limits
                engine = EngineShape(
                    blocks=plan.pool if ratio else plan.exact_pool,
                    block_size=limits.block_size,
                    max_num_seqs=MAX_NUM_SEQS,
                    max_num_batched_tokens=BATCHED_TOKENS,
                    compaction=limits if ratio else None,
                )
                row: Row = {"traffic": traffic.name, "GPU, GiB": memory, "kept": ratio or "all"}
                row["pool, tokens"] = engine.blocks * engine.block_size
                try:
                    outcome = Simulation(engine, costs).run(requests)
                except ValueError as error:
                    yield {**row, "tokens/s": str(error)}
                    continue
                first = sorted(outcome.first_tokens)
                speed = outcome.tokens_per_second
                exact = exact if ratio else speed
                yield {
                    **row,
                    "tokens/s": speed,
                    "of all": speed / exact if exact else "",
                    "answers at once, mean": outcome.mean_running,
                    "first token, median s": first[len(first) // 2],
                    "preemptions": outcome.preemptions,
                    "compactions": outcome.compactions,
                    "time in fits": outcome.fit_seconds / outcome.seconds,
                    "$ per million tokens": dollars / 3600 / speed * 1e6,
                }


def plot(folder: Path) -> None:
    """Tokens per second against the GPU's memory, a picture for each traffic."""
    with (folder / "fleet.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in TRAFFIC:
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            if row["traffic"] == name and row["of all"]:
                lines[row["kept"]].append((float(row["GPU, GiB"]), float(row["tokens/s"])))
        plot_lines(
            folder / f"fleet-{name}.png",
            f"Qwen3-4B, one GPU, {name} (simulated)",
            lines,
            x="memory, GiB",
            y="tokens/s",
        )


def main(
    out: Folder = None,
    record: Record = False,
    check: Annotated[
        bool, typer.Option("--check", help="The simulation against the real engine, on a CPU.")
    ] = False,
    requests: Annotated[int, typer.Option(help="Of each trace.")] = 200,
    seed: Annotated[int, typer.Option(help="Of lengths and arrivals.")] = 0,
    dollars: Annotated[float, typer.Option(help="Per GPU and hour.")] = 3.0,
) -> None:
    """Simulate, write ``fleet.{csv,md}`` and plots; or ``fleet-check.{csv,md}``."""
    folder = result_path(out, record)
    if check:
        from benchmarks.fleet.check import checked

        notes = [
            "Ten requests at once, 1,500 tokens of prompt and 500 of answer. Costs are fitted to "
            "five runs of other sizes in ample memory, for each engine by itself; tokens/s of "
            "tight pools are predicted from them."
        ]
        Report("fleet-check", "The simulation against the real engine", checked(), notes).write(
            folder
        )
        typer.echo((folder / "fleet-check.md").read_text())
        typer.echo(written(folder, "fleet-check.md", "fleet-check.csv"))
        return
    notes = [
        "Nothing here is measured: vLLM's scheduler and ours are simulated step by step, with the "
        "costs of an H200 (`benchmarks/fleet/costs.py`), whatever its memory. `conversation`: "
        "lengths and rate of Mooncake's trace; `documents`, `reasoning`: ours "
        "(`benchmarks/fleet/traces.py`). No prefixes are shared. `of all`: of the same GPU's "
        "tokens/s where all is kept.",
        f"Qwen3-4B, {requests} requests, threshold {THRESHOLD}, ${dollars:g} per GPU and hour.",
    ]
    title = "A GPU with a day's requests, on paper"
    Report("fleet", title, rows_of(requests, seed, dollars), notes).write(folder)
    plot(folder)
    typer.echo((folder / "fleet.md").read_text())
    names = [f"fleet-{name}.png" for name in TRAFFIC]
    typer.echo(written(folder, "fleet.md", "fleet.csv", *names))


if __name__ == "__main__":
    typer.run(main)
