"""The command line; see the package's docstring."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from benchmarks.cases import GPU_SUITE, Case, cases_of
from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_cost.counting import Counts
from benchmarks.gpu_cost.devices import H200, Device
from benchmarks.gpu_cost.stages import decode, slice_stages
from benchmarks.gpu_suite.fit_speed import slice_heads
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.plots import plot_lines

#: Sequences and slots per head of the decode steps.
DECODES = ((64, 1632), (256, 1632))


def rows_of(case: Case, device: Device) -> Iterator[Row]:
    """The stages of a compaction, then decode steps."""
    ratio = case.ratios[0]
    heads = slice_heads(case, ratio)
    for stage in slice_stages(case, heads, ratio):
        yield {
            "case": case.name,
            "stage": stage.name,
            **_row(stage.counts, device, case.head_dim),
            "slices": stage.slices,
            "whole, s": stage.slices * device.time(stage.counts, case.head_dim),
            "whole, launches": stage.slices * len(stage.counts.launches),
        }
    for sequences, slots in DECODES:
        counts = decode(case, sequences, slots)
        name = f"decode, {sequences} x {slots} slots, one layer"
        yield {"case": case.name, "stage": name, **_row(counts, device, case.head_dim)}


def _row(counts: Counts, device: Device, head_dim: int) -> Row:
    flop = counts.flop
    return {
        "TFLOP, 16 bit": flop["bf16"] / 1e12,
        "TFLOP, fp32": flop["fp32"] / 1e12,
        "TFLOP, fp64": flop["fp64"] / 1e12,
        "GB": counts.bytes / 1e9,
        "launches": len(counts.launches),
        "syncs": len(counts.syncs),
        "peak GiB": counts.peak / 2**30,
        "ms": 1e3 * device.time(counts, head_dim),
    }


def main(
    out: Folder = None,
    record: Record = False,
) -> None:
    """Count, write ``gpu_cost.{csv,md,png}``."""
    folder = result_path(out, record, "gpu" if record else "")
    cases = cases_of(GPU_SUITE)
    notes = [
        "Nothing here is measured: the code ran on tensors without contents, and what it would "
        f"launch on a GPU was counted. Times: by the ceilings of an {H200.name} "
        "(`benchmarks/gpu_cost/devices.py`); `attention.md` and `fit.md` hold what one took.",
        "Per slice of heads, as the engine fits them with uniform budgets, or with budgets as the "
        "default gives them to the heads of a real model (`benchmarks/uneven_budgets.py`; the "
        "measurement of the scores, another slice, is not in it); `whole`: all slices.",
        "Targets: Gemma-3-12B at most 0.30 s; Qwen3-4B at most 0.26 s (a quarter of its prefill); "
        "at most 3,000 launches per context, and 2 syncs per slice.",
    ]
    rows = (row for case in cases for row in rows_of(case, H200))
    table = Report("gpu_cost", "What compaction costs on a GPU, on paper", rows, notes)
    made = table.write(folder)
    lines: dict[str, list[tuple[float, float]]] = {}
    stages = [row for row in made if "slices" in row and not str(row["stage"]).startswith("all")]
    for row in stages:
        points = lines.setdefault(str(row["case"]), [])
        points.append((len(points), float(str(row["ms"]))))
    plot_lines(
        folder / "gpu_cost.png",
        "A slice's stages: select keys, fit bias, fit values, evaluate",
        lines,
        x="stage",
        y="ms on paper",
    )
    typer.echo((folder / "gpu_cost.md").read_text())
    typer.echo(written(folder, "gpu_cost.md", "gpu_cost.csv", "gpu_cost.png"))


if __name__ == "__main__":
    typer.run(main)
