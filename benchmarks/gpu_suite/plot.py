"""Plots of the suite's results, drawn from their CSV files on any machine with matplotlib."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from benchmarks.plots import plot_lines


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plot_results(folder: Path) -> list[Path]:
    """``attention.png`` and ``memory_bound.png`` beside their CSV files, where these exist.

    Returns:
        the plots.
    """
    plots = []
    if (path := folder / "attention.csv").exists():
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in _read(path):
            if row["slots per head"] == "0":
                continue  # nothing to read
            name = f"{row['slots per head']} slots per head, {row['heads']} heads"
            share = float(row["share of copy bandwidth"])
            lines[name].append((float(row["sequences"]), share))
        plot_lines(
            path.with_suffix(".png"),
            "Decode attention over compacted slots",
            lines,
            x="sequences",
            y="share of copy bandwidth",
        )
        plots.append(path.with_suffix(".png"))
    if (path := folder / "memory_bound.csv").exists():
        plot_memory_bound(path)
        plots.append(path.with_suffix(".png"))
    return plots


def plot_memory_bound(path: Path) -> None:
    """Throughput of stock and of each threshold against the size of the pool, beside the CSV."""
    rows = _read(path)
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        threshold = row["threshold"] and f", threshold {row['threshold']}"
        point = float(row["pool, contexts"]), float(row["tokens/s"])
        lines[row["engine"] + threshold].append(point)
    plot_lines(
        path.with_suffix(".png"),
        f"{rows[0]['requests']} requests of {int(rows[0]['prompt tokens']):,} tokens",
        lines,
        x="KV pool, in contexts that it holds exactly",
        y="output tokens per second",
    )
