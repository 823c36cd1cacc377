"""Measured rows: kept in a CSV as they come, so that a run can be resumed; table, Pareto plot."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter

from benchmarks.plots import GRID, INK, MUTED

#: The pseudo-method of the full cache.
FULL = "full cache"


@dataclass(frozen=True)
class Setting:
    """What was asked; rows of one setting can be compared with each other."""

    backend: str
    """"tensor" or "engine"."""
    mode: str
    """See ``conversations.Mode``."""
    density: str
    tokens: int
    """Of a document, about."""
    documents: int
    questions: str
    """At most so many per document: recall/restated/tally."""
    block_size: int
    model: str = "bundled"
    """A name in ``benchmarks.recall.recipe.RECIPES``."""

    def __str__(self) -> str:
        other = "" if self.model == "bundled" else f"{self.model} model, "
        return (
            f"{other}{self.density} documents, {self.documents} of about {self.tokens:,} tokens, "
            f"{self.mode}, {self.backend} back end, blocks of {self.block_size}"
        )


@dataclass(frozen=True)
class Row:
    """One configuration at one ratio. Shares are of the answers, memory of the full cache's.

    Attributes:
        options: JSON object of the configuration's options; ``FULL`` for no compaction.
        ratio: share of the span's keys that was asked for.
        recall, restated, tally: right answers; ``*_asked`` how many there were.
        nll: mean negative log-probability of an answer's token, nats.
        memory: blocks that a document's sequence holds, over those of its full cache.
        span_memory: the same of the compacted span alone; NaN where unknown.
        output_error, mass_error: mean over heads and held-out queries.
        seconds: of a compaction: CPU time in the tensor back end, on the clock in the engine.
        failures: compactions that failed; the sequence stayed exact.
        commit: of the working tree.
    """

    backend: str
    mode: str
    density: str
    tokens: int
    documents: int
    questions: str
    block_size: int
    options: str
    ratio: float
    recall: float
    recall_asked: int
    restated: float
    restated_asked: int
    tally: float
    tally_asked: int
    nll: float
    memory: float
    span_memory: float
    output_error: float
    mass_error: float
    seconds: float
    failures: int
    commit: str
    model: str = "bundled"

    @property
    def setting(self) -> Setting:
        return Setting(**{f.name: getattr(self, f.name) for f in fields(Setting)})

    @property
    def key(self) -> tuple[Setting, str, float]:
        """What was measured: equal for rows that would be measured again."""
        return self.setting, self.options, round(self.ratio, 6)

    @property
    def label(self) -> str:
        return label(self.options)

    @property
    def right(self) -> float:
        """Share of all answers."""
        pairs = (
            (self.recall, self.recall_asked),
            (self.restated, self.restated_asked),
            (self.tally, self.tally_asked),
        )
        asked = sum(count for _, count in pairs)
        return sum(share * count for share, count in pairs if count) / asked

    @property
    def reduction(self) -> str:
        return "full" if self.options == FULL else f"{1 / self.ratio:.3g}x"


def canonical(options: Mapping[str, Any]) -> str:
    """The options as JSON that is equal for equal options."""
    return json.dumps(dict(options), sort_keys=True)


def label(options: str) -> str:
    """A name for tables and legends: the values of the usual options, names and values of others.

    An option that is not named has the back end's default.
    """
    if options == FULL:
        return FULL
    parts = []
    values = json.loads(options)
    for name in ("method", "budgets", "queries"):
        value = values.pop(name, None)
        if isinstance(value, dict):
            value = "+".join(f"{share:g} {source}" for source, share in value.items())
        if value is not None:
            parts.append(Path(value).stem if value.endswith(".json") else value)
    parts += [f"{name}={value}" for name, value in values.items()]
    return " · ".join(parts) or "defaults"


class Store:
    """Rows in a CSV file, appended as soon as they are measured."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists() and not fresh:
            with path.open(newline="") as file:
                self.rows = [_parse(record) for record in csv.DictReader(file)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(_format(row) for row in self.rows)

    def has(self, setting: Setting, options: str, ratio: float) -> bool:
        return any(row.key == (setting, options, round(ratio, 6)) for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, [f.name for f in fields(Row)]).writerow(_format(row))


_TYPES = {"str": str, "int": int, "float": float}


def _parse(record: Mapping[str, str]) -> Row:
    # Rows that were written before there were two models have no such column.
    known = {"model": "bundled", **{k: v for k, v in record.items() if v is not None}}
    return Row(**{f.name: _TYPES[str(f.type)](known[f.name]) for f in fields(Row)})


def _format(row: Row) -> dict[str, object]:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(row).items()}


# -- table ----------------------------------------------------------------------------------------

COLUMNS = (
    "configuration",
    "ratio",
    "memory",
    "recall",
    "restated",
    "tally",
    "nll",
    "output error",
    "mass error",
    "s",
)


def table_cells(row: Row) -> list[str]:
    """One line of the table, for ``COLUMNS``."""
    compacted = row.options != FULL
    return [
        row.label,
        row.reduction,
        f"{row.memory:.1%} ({1 / row.memory:.1f}x)" if compacted else "100 %",
        *(
            f"{100 * share:.1f}" if asked else "–"
            for share, asked in (
                (row.recall, row.recall_asked),
                (row.restated, row.restated_asked),
                (row.tally, row.tally_asked),
            )
        ),
        f"{row.nll:.3f}",
        *(f"{x:.3f}" if compacted else "–" for x in (row.output_error, row.mass_error)),
        f"{row.seconds:.2f}" if compacted and not math.isnan(row.seconds) else "–",
    ]


def write_markdown(path: Path, rows: Sequence[Row], command: str, machine: str) -> None:
    """One table per setting, ratios together, the best configuration of each ratio first."""
    lines = [
        "# Quality after compaction",
        "",
        f"`{command}` (rows of earlier runs of the same file are kept). {machine}.",
        "",
        "Right answers in %, greedy; *nll*: nats per token of the reference answers; *memory*: "
        "blocks that a document's sequence holds, exact parts included, of its full cache's; "
        "*errors*: relative, of attention output and mass, on held-out queries; *s*: CPU seconds "
        "per compaction (engine: on the clock). What the settings and kinds of "
        "questions are: `benchmarks/quality/conversations.py`; the query sources: "
        "`benchmarks/quality/query_sources.py`.",
        "",
        f"![Accuracy and memory]({path.with_suffix('.png').name})",
        "",
    ]
    for setting in dict.fromkeys(row.setting for row in rows):
        here = [row for row in rows if row.setting == setting]
        asked = here[0]
        lines += [
            f"## {str(setting)[0].upper()}{str(setting)[1:]}",
            "",
            f"{asked.recall_asked} recall, {asked.restated_asked} restated, {asked.tally_asked} "
            "tally questions.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|---|---:|---:|{'---:|' * (len(COLUMNS) - 3)}",
        ]
        here.sort(key=lambda row: (-row.ratio, -row.right))
        lines += [f"| {' | '.join(table_cells(row))} |" for row in here]
        lines.append("")
    path.write_text("\n".join(lines))


# -- plot -----------------------------------------------------------------------------------------


_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def write_plot(path: Path, rows: Iterable[Row], shown: int = 10) -> None:
    """Accuracy against real memory: a panel per setting and kind, a line per configuration.

    Args:
        shown: configurations that get a colour and a name; all others are drawn in grey.
    """
    rows = list(rows)
    settings = list(dict.fromkeys(row.setting for row in rows))
    kinds = [k for k in ("recall", "restated", "tally") if any(_asked(r, k) for r in rows)]
    named = _best(rows, shown)
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(named)}
    figure, axes = plt.subplots(
        len(settings),
        len(kinds),
        figsize=(4.6 * len(kinds), 3.6 * len(settings) + 0.24 * len(named)),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for i, setting in enumerate(settings):
        here = [row for row in rows if row.setting == setting]
        for axis, kind in zip(axes[i], kinds, strict=True):
            _panel(axis, [row for row in here if _asked(row, kind)], kind, colours)
        axes[i, 0].set_title(f"{setting}\n{kinds[0]}", loc="left", fontsize=8.5)
    handles, names = _legend(axes.flat)
    figure.legend(handles, names, loc="outside lower left", fontsize=7.5, ncols=2, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _panel(axis: Axes, rows: Sequence[Row], kind: str, colours: Mapping[str, Any]) -> None:
    for name in dict.fromkeys(row.label for row in rows if row.options != FULL):
        line = sorted((row.memory, getattr(row, kind)) for row in rows if row.label == name)
        x, y = zip(*line, strict=True)
        colour = colours.get(name)
        axis.plot(
            x,
            y,
            "o-",
            markersize=3.5,
            linewidth=1.5 if colour is not None else 0.8,
            color=colour if colour is not None else "0.8",
            label=name if colour is not None else None,
            zorder=3 if colour is not None else 1,
        )
    for row in rows:
        if row.options == FULL:
            axis.axhline(
                getattr(row, kind), color=INK, linewidth=1, linestyle=(0, (4, 3)), label=FULL
            )
    axis.set_xscale("log")
    axis.set_xlim(0.9 * min(row.memory for row in rows), 1.1)
    axis.set_xticks([x for x in _TICKS if x >= axis.get_xlim()[0]])
    axis.set_xlabel("memory of the sequence, of the full cache's", color=MUTED)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylim(-0.02, 1.03)
    axis.set_title(kind, loc="left", fontsize=8.5)
    axis.grid(color=GRID)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(axes: Iterable[Axes]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return list(found.values()), list(found)


def _best(rows: Sequence[Row], count: int) -> list[str]:
    """Names of the configurations to tell apart: measured at the most ratios, then the best.

    The best have the highest mean share of right answers, over the ratios that all were measured
    at: a mean over easier ratios is no merit.
    """
    of_name: dict[str, list[Row]] = {}
    for row in rows:
        if row.options != FULL:
            of_name.setdefault(row.label, []).append(row)
    ratios = [{row.ratio for row in found} for found in of_name.values()]
    shared = set.intersection(*ratios) if ratios else set()

    def rank(name: str) -> tuple[int, float]:
        found = of_name[name]
        right = [row.right for row in found if row.ratio in shared]
        return -len({row.ratio for row in found}), -sum(right) / max(1, len(right))

    return sorted(of_name, key=rank)[:count]


def _asked(row: Row, kind: str) -> int:
    count: int = getattr(row, f"{kind}_asked")
    return count
