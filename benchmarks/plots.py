"""Plots of benchmark results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
LINES = ("#2563a8", "#c2571a", "#3d8361")
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
