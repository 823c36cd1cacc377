"""The recall benchmark: held-out documents, compacted in every way, then asked about.

Every combination of methods, budgets, query sources and ratios is one row; configurations that are
no such product are given as JSON. A row that is in the CSV already is not measured again.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.folders import Record, result_path, written
from benchmarks.machine import commit, machine_line
from benchmarks.quality import engine_backend, tensor_backend
from benchmarks.quality.conversations import (
    RECALL,
    RESTATED,
    TALLY,
    Conversation,
    Grade,
    Mode,
    grade,
    make_conversations,
)
from benchmarks.quality.results import (
    COLUMNS,
    FULL,
    Row,
    Setting,
    Store,
    canonical,
    table_cells,
    write_markdown,
    write_plot,
)
from benchmarks.recall.recipe import RECIPES
from vllm_am.compaction import FitError
from vllm_am.config import parse_ratio

RATIOS = "2x,5x,10x,20x,50x,100x"
QUICK_RATIOS = "5x,20x"
#: What is measured unless said otherwise: the paper's method under each budget kind, the default
#: candidates, and eviction as published (H2O+, KVzip, SnapKV).
METHODS = "highest-attention,peaks-and-coverage,omp-fast,evict-mean,evict-max,snapkv,random"


class Backend(StrEnum):
    """Where compaction takes place."""

    TENSOR = "tensor"
    ENGINE = "engine"


class Model(StrEnum):
    """Who reads and answers: ``benchmarks.recall.recipe``."""

    BUNDLED = "bundled"
    VALIDATION = "validation"


class Density(StrEnum):
    """How much of a document is facts."""

    SPARSE = "sparse"
    DENSE = "dense"
    BOTH = "both"


@dataclass(frozen=True)
class Questions:
    """At most so many of each kind, per document."""

    recall: int
    restated: int
    tally: int

    @classmethod
    def parse(cls, text: str) -> Questions:
        try:
            recall, restated, tally = map(int, text.split("/"))
        except ValueError:
            raise typer.BadParameter(
                f"--asked={text!r}: expected three counts, recall/restated/tally, such as 14/6/3"
            ) from None
        return cls(recall, restated, tally)


@dataclass(frozen=True)
class Measured:
    """What a back end returns for one configuration at one ratio."""

    grade: Grade
    memory: float
    span_memory: float
    output_error: float
    mass_error: float
    seconds: float
    failures: int = 0


class TensorRunner:
    """Reads every document once per setting, then measures configurations on it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        recipe = RECIPES[setting.model]
        self.model = tensor_backend.load_model(recipe)
        questions = asdict(Questions.parse(setting.questions))
        self.readings = []
        for seed in range(setting.documents):
            conversations = make_conversations(
                seed,
                setting.tokens,
                setting.density,
                Mode(setting.mode),
                **questions,
                recipe=recipe,
            )
            self.readings += [
                tensor_backend.Reading(self.model, c, seed, setting.tokens, setting.density, recipe)
                for c in conversations
            ]

    def full(self) -> Measured:
        size = self.setting.block_size
        return self._summary([tensor_backend.full_cache(r, size) for r in self.readings], 0)

    def measure(
        self, options: Mapping[str, Any], ratios: Sequence[float]
    ) -> Iterator[tuple[float, Measured]]:
        for ratio in ratios:
            parsed = tensor_backend.TensorOptions.from_dict(ratio, options)
            outcomes, failures = [], 0
            for reading in self.readings:
                try:
                    outcome = tensor_backend.run(reading, parsed, self.setting.block_size)
                except FitError:  # as in the engine: the sequence stays exact
                    outcome = tensor_backend.full_cache(reading, self.setting.block_size)
                    failures += 1
                outcomes.append(outcome)
            yield ratio, self._summary(outcomes, failures)

    def _summary(self, outcomes: Sequence[tensor_backend.Outcome], failures: int) -> Measured:
        conversations = [reading.conversation for reading in self.readings]
        count = len(outcomes)
        span = sum(o.span_full_blocks for o in outcomes)
        return Measured(
            grade(conversations, [o.score for o in outcomes]),
            memory=sum(o.blocks for o in outcomes) / sum(o.full_blocks for o in outcomes),
            span_memory=sum(o.span_blocks for o in outcomes) / span if span else 1.0,
            output_error=sum(o.output_error for o in outcomes) / count,
            mass_error=sum(o.mass_error for o in outcomes) / count,
            seconds=sum(o.seconds for o in outcomes) / count,
            failures=failures,
        )


class EngineRunner:
    """Starts an engine per configuration; all ratios are measured in it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        questions = asdict(Questions.parse(setting.questions))
        self.conversations: list[Conversation] = []
        for seed in range(setting.documents):
            self.conversations += make_conversations(
                seed,
                setting.tokens,
                setting.density,
                Mode(setting.mode),
                **questions,
                recipe=RECIPES[setting.model],
            )

    def full(self) -> Measured:
        return next(self._run({}, [None]))[1]

    def measure(
        self, options: Mapping[str, Any], ratios: Sequence[float]
    ) -> Iterator[tuple[float, Measured]]:
        for ratio, measured in self._run(options, ratios):
            assert ratio is not None
            yield ratio, measured

    def _run(
        self, options: Mapping[str, Any], ratios: Sequence[float | None]
    ) -> Iterator[tuple[float | None, Measured]]:
        mode = Mode(self.setting.mode)
        model = RECIPES[self.setting.model].model
        results = engine_backend.run(model, options, ratios, self.conversations, mode)
        for ratio, result in zip(ratios, results, strict=True):
            due = 0 if ratio is None else len(self.conversations)
            yield (
                ratio,
                Measured(
                    grade(self.conversations, result.scores),
                    memory=result.blocks / result.full_blocks,
                    span_memory=math.nan,
                    output_error=result.output_error,
                    mass_error=result.mass_error,
                    seconds=result.seconds,
                    failures=due - result.compactions,
                ),
            )


def configurations(
    methods: str, budgets: str, queries: str, extra: Sequence[str]
) -> list[dict[str, Any]]:
    """All combinations of comma-separated names, then JSON objects or files of a list of them."""
    names = ([part for part in text.split(",") if part] for text in (methods, budgets, queries))
    found: list[dict[str, Any]] = [
        dict(zip(("method", "budgets", "queries"), combination, strict=True))
        for combination in itertools.product(*names)
    ]
    for text in extra:
        content = json.loads(Path(text).read_text() if text.endswith(".json") else text)
        found += content if isinstance(content, list) else [content]
    return list({canonical(options): options for options in found}.values())


def parse_ratios(text: str) -> list[float]:
    """A list such as ``2x,5x,0.1``."""
    return [parse_ratio(part, "--ratios") for part in text.replace(",", " ").split()]


def main(
    backend: Annotated[Backend, typer.Option(help="Where to compact.")] = Backend.TENSOR,
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents.")] = 16,
    lengths: Annotated[str, typer.Option(help="Tokens per document; a list.")] = "2000",
    density: Annotated[Density, typer.Option(help="Facts per document.")] = Density.BOTH,
    mode: Annotated[Mode, typer.Option(help="Where the questions stand.")] = Mode.AFTER,
    asked: Annotated[
        str, typer.Option(help="Questions per document: recall/restated/tally.")
    ] = "14/6/3",
    ratios: Annotated[str, typer.Option(help="Compaction ratios; 5x keeps 0.2.")] = RATIOS,
    methods: Annotated[str, typer.Option(help="Methods; a list.")] = METHODS,
    budgets: Annotated[str, typer.Option(help="uniform, global, FILE.json.")] = "uniform,global",
    queries: Annotated[str, typer.Option(help="Query sources; a list.")] = "context-rotated",
    config: Annotated[
        list[str] | None,
        typer.Option(help="A further configuration as JSON, or a FILE.json of a list of them."),
    ] = None,
    model: Annotated[
        Model, typer.Option(help="validation: nothing was ever chosen on it.")
    ] = Model.BUNDLED,
    block_size: Annotated[int, typer.Option(help="Tensor back end: slots per page.")] = 16,
    quick: Annotated[bool, typer.Option(help="2 documents, 2 ratios: does it run?")] = False,
    fresh: Annotated[bool, typer.Option(help="Forget the rows that are there.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="CSV; table and plot beside it.", show_default="benchmarks/out/quality.csv"
        ),
    ] = None,
    record: Record = False,
) -> None:
    """Accuracy against real memory, on a recall model."""
    console = Console(highlight=False)
    path = result_path(output, record, "quality.csv")
    if not RECIPES[model].model.exists():
        raise typer.BadParameter(
            f"--model {model}: train it first, `python -m benchmarks.recall.train --recipe {model} "
            "--record`"
        )
    if quick:
        documents, ratios = min(documents, 2), QUICK_RATIOS if ratios == RATIOS else ratios
    plan = configurations(methods, budgets, queries, config or [])
    wanted = parse_ratios(ratios)
    if backend is Backend.ENGINE:
        block_size = engine_backend.BLOCK_SIZE
    densities = [d for d in ("sparse", "dense") if density in (Density.BOTH, d)]
    settings = [
        Setting(backend, mode, kind, int(length), documents, asked, block_size, model)
        for length in lengths.split(",")
        for kind in densities
    ]
    store = Store(path, fresh)
    for setting in settings:
        _measure(console, setting, plan, wanted, store, commit())
        console.print(_table([row for row in store.rows if row.setting == setting]))
    command = " ".join(["python -m benchmarks.quality", *map(shlex.quote, sys.argv[1:])])
    write_markdown(path.with_suffix(".md"), store.rows, command, machine_line())
    write_plot(path.with_suffix(".png"), store.rows)
    names = (path.with_suffix(suffix).name for suffix in (".csv", ".md", ".png"))
    console.print(written(path.parent, *names))


def _measure(
    console: Console,
    setting: Setting,
    plan: Sequence[Mapping[str, Any]],
    ratios: Sequence[float],
    store: Store,
    commit: str,
) -> None:
    """Measure what the store does not have yet, each row stored at once."""
    missing = {
        canonical(options): [r for r in ratios if not store.has(setting, canonical(options), r)]
        for options in plan
    }
    total = sum(map(len, missing.values())) + (not store.has(setting, FULL, 1.0))
    if not total:
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{setting.density}: reading the documents", total=total)
        runner = (TensorRunner if setting.backend == "tensor" else EngineRunner)(setting)
        if not store.has(setting, FULL, 1.0):
            store.add(_row(setting, FULL, 1.0, runner.full(), commit))
            progress.advance(task)
        for options in plan:
            name = canonical(options)
            if not missing[name]:
                continue
            progress.update(task, description=f"{setting.density}: {' '.join(_words(options))}")
            for ratio, measured in runner.measure(options, missing[name]):
                store.add(_row(setting, name, ratio, measured, commit))
                progress.advance(task)


def _words(options: Mapping[str, Any]) -> list[str]:
    return [str(value) for value in options.values()]


def _row(setting: Setting, options: str, ratio: float, measured: Measured, commit: str) -> Row:
    counts = measured.grade.counts
    return Row(
        **asdict(setting),
        options=options,
        ratio=ratio,
        recall=counts[RECALL].share,
        recall_asked=counts[RECALL].asked,
        restated=counts[RESTATED].share,
        restated_asked=counts[RESTATED].asked,
        tally=counts[TALLY].share,
        tally_asked=counts[TALLY].asked,
        nll=measured.grade.nll,
        memory=measured.memory,
        span_memory=measured.span_memory,
        output_error=measured.output_error,
        mass_error=measured.mass_error,
        seconds=measured.seconds,
        failures=measured.failures,
        commit=commit,
    )


def _table(rows: Sequence[Row]) -> Table:
    table = Table(*COLUMNS, title=str(rows[0].setting), title_justify="left", box=None)
    for row in sorted(rows, key=lambda row: (-row.ratio, -row.right)):
        table.add_row(*table_cells(row))
    return table
