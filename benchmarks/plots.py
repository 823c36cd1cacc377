"""Plots of benchmark results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
LINES = ("#2563a8", "#c2571a", "#3d8361")
MORE_LINES = ("#7a4fa3", "#b08900", "#c03d6b", "#3b8ea5", "#6b7280", "#111827")
BAR, BAR_FULL = "#5b8ec2", "#c3ccd5"

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.bottom": False,
    "legend.frameon": False,
}


def plot_modes(
    path: Path,
    title: str,
    modes: Sequence[str],
    blocks: Sequence[float],
    accuracy: Mapping[str, Sequence[float]],
    promise: tuple[float, str] | None = None,
) -> None:
    """Accuracy and memory of one model under several cache sizes, the full cache first.

    Args:
        path: PNG to write.
        modes: names for the x axis.
        blocks: mean KV blocks that a sequence holds, per mode.
        accuracy: series by name, one share in [0, 1] per mode; empty leaves that panel out.
        promise: an accuracy to draw as a line, and its label.
    """
    with plt.rc_context(_STYLE):
        panels = 2 if accuracy else 1
        figure, axes = plt.subplots(
            1, panels, figsize=(4.9 * panels, 4.0), layout="constrained", squeeze=False
        )
        if accuracy:
            _accuracy_panel(axes[0, 0], modes, accuracy, promise)
        _blocks_panel(axes[0, -1], modes, blocks)
        figure.suptitle(title, x=0.012, ha="left", fontsize=10, color=MUTED)
        figure.savefig(path, dpi=160)
        plt.close(figure)


@dataclass(frozen=True)
class Series:
    """A line: values by their place on the x axis. Lines of one ``family`` share a colour."""

    family: str
    points: dict[str, float]
    dashed: bool = False


def plot_series(
    path: Path, title: str, grid: Mapping[tuple[str, str], Mapping[str, Series]]
) -> None:
    """Small multiples on logarithmic scales.

    Args:
        path: PNG to write.
        grid: (row, column) -> the lines of that panel, by label. All panels share their x axis.
    """
    rows = list(dict.fromkeys(row for row, _ in grid))
    columns = list(dict.fromkeys(column for _, column in grid))
    families = dict.fromkeys(line.family for panel in grid.values() for line in panel.values())
    colour = dict(zip(families, (*LINES, *MORE_LINES), strict=False))
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            len(rows),
            len(columns),
            figsize=(3.9 * len(columns), 3.1 * len(rows) + 0.6),
            layout="constrained",
            squeeze=False,
        )
        for (row, column), panel in grid.items():
            place = axes[rows.index(row), columns.index(column)]
            for label, line in panel.items():
                place.plot(
                    list(line.points),
                    list(line.points.values()),
                    "s--" if line.dashed else "o-",
                    label=label,
                    color=colour.get(line.family, MUTED),
                    markerfacecolor="white" if line.dashed else None,
                    linewidth=1.3 if line.dashed else 1.9,
                    markersize=5,
                )
            place.set_yscale("log")
            place.yaxis.set_major_formatter("{x:g}")
            place.yaxis.set_minor_formatter(_few_minor_labels)
            place.tick_params(axis="y", which="both", labelsize=8.5)
            place.set_title(f"{row}: {column}")
        handles = {
            label: handle
            for place in axes.flat
            for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize=8.5
        )
        figure.suptitle(title, x=0.012, ha="left", fontsize=10, color=MUTED)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def plot_lines(
    path: Path,
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
) -> None:
    """Lines through points (x, y), x on a logarithmic scale.

    Args:
        path: PNG to write.
        lines: points by the name of the line, in any order.
        x, y: labels of the axes.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, linewidth=1.8)
        axes.set_xscale("log", base=2)
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _few_minor_labels(value: float, position: int | None = None) -> str:
    """Between the powers of ten, label 2 and 5."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _accuracy_panel(
    axes: Axes,
    modes: Sequence[str],
    accuracy: Mapping[str, Sequence[float]],
    promise: tuple[float, str] | None,
) -> None:
    for i, ((name, shares), colour) in enumerate(zip(accuracy.items(), LINES, strict=False)):
        first = i == 0
        axes.plot(
            range(len(modes)),
            shares,
            "o-",
            label=name,
            color=colour,
            linewidth=2.4 if first else 1.4,
            markersize=7 if first else 5,
            alpha=1 if first else 0.75,
            zorder=3 - 0.1 * i,
        )
    if promise is not None:
        axes.axhline(promise[0], color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        axes.text(0, promise[0] - 0.01, promise[1], va="top", color=MUTED, fontsize=8.5)
    axes.set_title("Right answers")
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks(range(len(modes)), modes)
    axes.set_xlabel("KV cache of the document")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.02, 1),
        ncols=len(accuracy),
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1,
    )


def _blocks_panel(axes: Axes, modes: Sequence[str], blocks: Sequence[float]) -> None:
    colours = [BAR_FULL] + [BAR] * (len(modes) - 1)
    bars = axes.bar(range(len(modes)), blocks, width=0.62, color=colours)
    labels = [f"{blocks[0]:.0f}"]
    labels += [f"{count:.0f}\n({blocks[0] / count:.1f}x smaller)" for count in blocks[1:]]
    axes.bar_label(bars, labels, padding=3, fontsize=9)
    axes.set_title("KV blocks held per sequence")
    axes.set_ylim(0, 1.15 * max(blocks))
    axes.set_xticks(range(len(modes)), modes)
    axes.set_xlabel("KV cache of the document")
