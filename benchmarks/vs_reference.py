"""Ours against the paper's own code, side by side on identical tensors.

    git clone https://github.com/adamzweiger/compaction /somewhere
    python -m benchmarks.vs_reference --reference /somewhere

The reference's algorithms run in this process, from the checkout that the user names, in the
configurations that it publishes. Both sides get the same keys, values and reference queries and as
many slots; both are judged by one evaluator in float64, on queries that neither has seen.

How to read it:

- Seconds are per head, medians of runs that alternate between the two sides. Ours takes all heads
  of a case as one batch, which the reference cannot. CPU seconds, given for one thread, hardly
  depend on what else the machine is doing; those on the clock do.
- Output error: mean over queries of |Y' - Y| / |Y|; mass error: of |mass' / mass - 1|; then the
  mean over heads. Less is better, and 1 is what a cache that keeps nothing has.
- The reference queries of the recall model are those of the document itself, the held-out ones
  those of the questions and answers that follow.
- Methods of ours that the paper does not have are compared with its best one, AM-OMP.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from benchmarks.cases import VS_REFERENCE, Case, cases_of
from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.machine import machine_line
from benchmarks.plots import Series, plot_series
from benchmarks.recall.documents import chat_words, make_document
from benchmarks.recall.model import load, rope_tables
from tests.compaction.synthetic import dense_errors, stack_heads, synthetic_head
from vllm_am.compaction import METHODS, compact
from vllm_am.config import CompactionConfigError, parse_ratio

HERE = Path(__file__).parent
RECALL_MODEL = HERE / "recall" / "model"
REPOSITORY = "https://github.com/adamzweiger/compaction"

HELD_OUT_QUERIES = 1000
#: Repeating stops after this many seconds per cell: OMP in the reference can take minutes.
CELL_SECONDS = 20.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Counterpart:
    """A published configuration of the reference: the paper's name, and the one in its files."""

    name: str
    configuration: str


AM_OMP = Counterpart("AM-OMP", "omp_nnls0_-inf_7_drop-7_lsq_progressive")
COUNTERPARTS = {
    "highest-attention": Counterpart("AM-HighestAttnKeys", "highest_attn_keys_rms_nnls2_-3_3_lsq"),
    "omp": AM_OMP,
    "omp-fast": Counterpart("AM-OMP-fast", "omp_nnls0_-inf_7_drop-7_lsq_k4int2"),
}
#: By default: the paper's methods, and that of ours with the least errors.
COMPARED = (*COUNTERPARTS, "eliminate")


@dataclass(frozen=True)
class Heads:
    """keys, values [H, T, D], queries [H, N, D] to fit to and held_out [H, M, D] to judge by.

    ``queries`` consists of ``group_size`` runs in the order of positions.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    held_out: Tensor
    group_size: int = field(kw_only=True)

    def stored(self, dtype: torch.dtype, count: int) -> Heads:
        """``count`` heads spread over all of them (0: all), in that dtype."""
        total = len(self.keys)
        chosen = torch.linspace(0, total - 1, min(count, total) or total).round().long()
        tensors = (self.keys, self.values, self.queries, self.held_out)
        stored = (tensor[chosen].to(dtype) for tensor in tensors)
        return Heads(*stored, group_size=self.group_size)


@dataclass(frozen=True)
class Fitted:
    """keys [H, t, D], bias [H, t], values [H, t, D] of a compacted cache."""

    keys: Tensor
    bias: Tensor
    values: Tensor


@dataclass(frozen=True)
class Row:
    """One of our methods against its counterpart. Seconds and errors are means over heads."""

    case: str
    method: str
    counterpart: str
    ratio: float
    slots: int
    threads: int
    repeats: int
    seconds: float
    reference_seconds: float
    cpu_seconds: float
    reference_cpu_seconds: float
    output_error: float
    reference_output_error: float
    mass_error: float
    reference_mass_error: float


# -- the two sides --------------------------------------------------------------------------------


class Reference:
    """The algorithms in a checkout of the paper's code.

    Raises:
        typer.BadParameter: it is not such a checkout.
    """

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout.resolve()
        self._configurations = self.checkout / "evaluation" / "configs" / "algorithms" / "best.py"
        for needed in (self.checkout / "compaction" / "algorithms", self._configurations):
            if not needed.exists():
                raise typer.BadParameter(
                    f"{checkout} is not a checkout of the paper's code: it has no "
                    f"{needed.relative_to(self.checkout)}. Get one: git clone {REPOSITORY}",
                    param_hint="--reference",
                )

    @cached_property
    def _published(self) -> tuple[dict[str, type[Any]], dict[str, dict[str, Any]]]:
        """Algorithms by name, and the configurations. They import each other by absolute names."""
        sys.path.insert(0, str(self.checkout))
        try:
            algorithms = importlib.import_module("compaction.algorithms").ALGORITHM_REGISTRY
            spec = importlib.util.spec_from_file_location("_reference_best", self._configurations)
            assert spec is not None and spec.loader is not None  # it is a .py file
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(self.checkout))
        return algorithms, module.config

    def compact(self, counterpart: Counterpart, heads: Heads, slots: int) -> Fitted:
        """One head after the other, as the reference does."""
        algorithms, configurations = self._published
        options = dict(configurations[counterpart.configuration])
        algorithm = algorithms[options.pop("algorithm")](**options)
        parts = []
        with redirect_stdout(io.StringIO()):  # it reports its progress there
            for k, v, q in zip(heads.keys, heads.values, heads.queries, strict=True):
                keys, bias, values, _ = algorithm.compute_compacted_cache(k, v, q, slots)
                parts.append((keys, bias, values))
        return Fitted(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))


def compact_ours(method: str, heads: Heads, slots: int) -> Fitted:
    """All heads as one batch."""
    result = compact(
        heads.keys,
        heads.values,
        heads.queries,
        budget=slots,
        method=method,
        group_size=heads.group_size,
    )
    return Fitted(result.keys, result.bias, result.values)


# -- the heads ------------------------------------------------------------------------------------


def synthetic_heads(case: Case) -> Heads:
    parts = (
        synthetic_head(seed, T=case.tokens, d=case.head_dim, n=case.queries, m=HELD_OUT_QUERIES)
        for seed in range(case.heads)
    )
    return Heads(*stack_heads(*parts), group_size=1)


@torch.no_grad()
def recall_heads(case: Case, seed: int = 0) -> Heads:
    """Keys and values of a held-out document in the recall model, and the queries that met them."""
    model = load(RECALL_MODEL)
    vocabulary = json.loads((RECALL_MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    document = make_document(seed, case.tokens)
    words = [word for word, _ in chat_words(document, document.questions)]
    ids = torch.tensor([vocabulary[word] for word in words])
    span = 2 + len(document.words)  # the chat's header comes first
    positions = torch.linspace(0, span - 1, min(span, case.queries // case.group_size)).long()

    rope = rope_tables(len(ids), model.config)
    x = model.embed_tokens(ids[None])
    heads = []
    for layer in model.blocks():
        attention = layer.self_attn
        q, k, v = attention.project(layer.input_layernorm(x), rope)
        groups = q[0].unflatten(0, (k.shape[1], -1))  # [kv heads, group, tokens, D]
        heads.append(
            (
                k[0, :, :span],
                v[0, :, :span],
                groups[:, :, positions].flatten(1, 2),
                groups[:, :, span:].flatten(1, 2),
            )
        )
        x = layer(x, rope)
    return Heads(*stack_heads(*heads), group_size=case.group_size)


def make_heads(case: Case) -> Heads:
    return recall_heads(case) if case.name == "recall" else synthetic_heads(case)


# -- the comparison -------------------------------------------------------------------------------


def slots_for(ratio: float, tokens: int) -> int:
    return max(1, math.ceil(round(ratio * tokens, 6)))


def judge(heads: Heads, fitted: Fitted) -> tuple[float, float]:
    """Held-out output and mass error, means over heads."""
    output, mass = dense_errors(
        heads.keys, heads.values, heads.held_out, fitted.keys, fitted.bias, fitted.values
    )
    return output.mean().item(), mass.mean().item()


class Stopwatch:
    """Seconds of several runs, on the clock and of the CPU."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def run(self, work: Callable[[], Fitted]) -> Fitted:
        wall, cpu = time.perf_counter(), time.process_time()
        fitted = work()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return fitted


@dataclass(frozen=True)
class Cell:
    """What is measured together: one case at one ratio with one number of threads."""

    case: Case
    ratio: float
    threads: int
    counterpart: Counterpart
    methods: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.case.name} {1 / self.ratio:.3g}x, {self.counterpart.name}, {self.threads}"


def make_cells(
    cases: Sequence[Case], ratios: Sequence[float], threads: Sequence[int], methods: Sequence[str]
) -> list[Cell]:
    """All combinations; the methods that share a counterpart share a cell."""
    groups: dict[Counterpart, list[str]] = {}
    for method in methods:
        groups.setdefault(COUNTERPARTS.get(method, AM_OMP), []).append(method)
    return [
        Cell(case, ratio, count, counterpart, members)
        for case in cases
        for ratio in ratios or case.ratios
        for counterpart, members in groups.items()
        for count in threads
    ]


def measure(cell: Cell, reference: Reference, heads: Heads, repeats: int) -> Iterator[Row]:
    """A row per method: it and the counterpart run in turns."""
    count, tokens, _ = heads.keys.shape
    slots = slots_for(cell.ratio, tokens)
    runs = {method: partial(compact_ours, method, heads, slots) for method in cell.methods}
    results = {method: run() for method, run in runs.items()}  # also warms up
    watches = {method: Stopwatch() for method in cell.methods}
    watch = Stopwatch()
    started = time.perf_counter()
    while not watch.wall or (
        len(watch.wall) < repeats and time.perf_counter() - started < CELL_SECONDS
    ):
        theirs = watch.run(partial(reference.compact, cell.counterpart, heads, slots))
        for method, run in runs.items():
            watches[method].run(run)
    reference_output, reference_mass = judge(heads, theirs)
    for method in cell.methods:
        output, mass = judge(heads, results[method])
        yield Row(
            case=cell.case.name,
            method=method,
            counterpart=cell.counterpart.name,
            ratio=cell.ratio,
            slots=slots,
            threads=cell.threads,
            repeats=len(watch.wall),
            seconds=statistics.median(watches[method].wall) / count,
            reference_seconds=statistics.median(watch.wall) / count,
            cpu_seconds=statistics.median(watches[method].cpu) / count,
            reference_cpu_seconds=statistics.median(watch.cpu) / count,
            output_error=output,
            reference_output_error=reference_output,
            mass_error=mass,
            reference_mass_error=reference_mass,
        )


# -- what came out --------------------------------------------------------------------------------


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one case: a line per ratio and method, seconds for each thread count."""
    header = ["kept", "method", "against", "output error", "mass error"]
    for threads in sorted({row.threads for row in rows}):
        header += ["CPU s/head"] if threads == 1 else []
        header.append(f"s/head, {threads} thread{'s' * (threads > 1)}")
    lines: dict[tuple[float, str], list[str]] = {}
    for row in rows:
        line = lines.setdefault(
            (row.ratio, row.method),
            [
                f"{1 / row.ratio:.3g}x ({row.slots})",
                row.method,
                row.counterpart,
                f"{row.output_error:.3f} / {row.reference_output_error:.3f}",
                f"{row.mass_error:.3f} / {row.reference_mass_error:.3f}",
            ],
        )
        if row.threads == 1:
            line.append(_seconds(row.cpu_seconds, row.reference_cpu_seconds))
        line.append(_seconds(row.seconds, row.reference_seconds))
    return header, list(lines.values())


def _seconds(ours: float, theirs: float) -> str:
    return f"{ours:.3f} / {theirs:.3f} ({theirs / ours:.1f}x)"


def machine() -> str:
    """The machine, and how busy it was: others' work shows in the seconds."""
    return f"{machine_line()}; load average {os.getloadavg()[0]:.1f} before"


def describe(case: Case, heads: Heads) -> str:
    count, tokens, width = heads.keys.shape
    return (
        f"{case.source}: {count} heads, T = {tokens}, n = {heads.queries.shape[1]}, d = {width}, "
        f"judged on {heads.held_out.shape[1]} other queries."
    )


def write_csv(path: Path, heading: Sequence[str], rows: Sequence[Row]) -> None:
    """``heading`` as comments, then a line per row, unrounded enough to compute with."""
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in heading)
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            cells = asdict(row).items()
            writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in cells})


def write_markdown(
    path: Path, heading: Sequence[str], descriptions: dict[str, str], rows: Sequence[Row]
) -> None:
    command, environment = heading
    lines = ["# Against the paper's code", "", f"`{command}`", "", f"{environment}.", ""]
    lines += ["Every cell is ours / the reference's.", ""]
    for name, description in descriptions.items():
        header, cells = table_of([row for row in rows if row.case == name])
        lines += [f"## {name}", "", description, ""]
        lines += [f"| {' | '.join(header)} |", f"|---|---|---|{'---:|' * (len(header) - 3)}"]
        lines += [f"| {' | '.join(line)} |" for line in cells]
        lines.append("")
    lines += ["![Errors and time](vs_reference.png)", ""]
    lines += ["How to read it: the docstring of `benchmarks/vs_reference.py`.", ""]
    path.write_text("\n".join(lines))


def write_plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Errors and seconds against the ratio, a row of panels per case, at the most threads."""
    most = max(row.threads for row in rows)
    measures = {
        "output error": ("output_error", "reference_output_error"),
        "mass error": ("mass_error", "reference_mass_error"),
        f"s per head, {most} thread{'s' * (most > 1)}": ("seconds", "reference_seconds"),
    }
    grid = {}
    for case in dict.fromkeys(row.case for row in rows):
        for measure, (ours, theirs) in measures.items():
            series: dict[str, Series] = {}
            for row in rows:
                if row.case != case or row.threads != most:
                    continue
                x = f"{1 / row.ratio:.3g}x"
                line = series.setdefault(row.method, Series(row.method, {}))
                line.points[x] = getattr(row, ours)
                line = series.setdefault(row.counterpart, Series(row.method, {}, dashed=True))
                line.points[x] = getattr(row, theirs)
            grid[case, measure] = series
    plot_series(path, title, grid)


def parse_list(text: str) -> list[str]:
    return text.replace(",", " ").split()


def parse_ratios(text: str) -> list[float]:
    try:
        return [parse_ratio(part, "--ratios") for part in parse_list(text)]
    except CompactionConfigError as error:
        raise typer.BadParameter(str(error)) from None


def parse_cases(text: str) -> list[Case]:
    known = {case.name: case for case in cases_of(VS_REFERENCE)}
    if unknown := [name for name in parse_list(text) if name not in known]:
        raise typer.BadParameter(
            f"--cases: unknown {', '.join(unknown)}; known are {', '.join(known)}"
        )
    return [known[name] for name in parse_list(text)]


def parse_methods(text: str) -> list[str]:
    names = list(METHODS) if text == "all" else parse_list(text)
    if unknown := [name for name in names if name not in METHODS]:
        raise typer.BadParameter(
            f"--methods: unknown {', '.join(unknown)}; known are all, {', '.join(METHODS)}"
        )
    return names


def parse_threads(text: str) -> list[int]:
    cores = len(os.sched_getaffinity(0))
    try:
        counts = {cores if part == "all" else int(part) for part in parse_list(text)}
    except ValueError:
        counts = set()
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"--threads={text!r}: expected numbers, or all, such as 1,all")
    return sorted(counts)


def main(
    reference: Annotated[Path, typer.Option(help=f"Checkout of {REPOSITORY}.")],
    methods: Annotated[str, typer.Option(help="Ours, by name, or all.")] = ",".join(COMPARED),
    ratios: Annotated[str, typer.Option(help="5x keeps 0.2; default: each case's.")] = "",
    cases: Annotated[str, typer.Option(help="Of benchmarks/cases.py.")] = "synthetic,recall",
    heads: Annotated[int, typer.Option(min=0, help="So many of a case's heads; 0 for all.")] = 0,
    threads: Annotated[str, typer.Option(help="Thread counts to measure with.")] = "1,all",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each side.")] = 5,
    dtype: Annotated[str, typer.Option(help=f"Storage: {', '.join(DTYPES)}.")] = "float32",
    quick: Annotated[bool, typer.Option(help="One head of 1,024 keys, two ratios.")] = False,
    output: Folder = None,
    record: Record = False,
) -> None:
    """Compare compaction methods with the paper's own code, in time and in held-out error."""
    console = Console(highlight=False, width=120)
    folder = result_path(output, record)
    theirs = Reference(reference)
    names = parse_methods(methods)
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: unknown {dtype!r}, known are {', '.join(DTYPES)}")
    if quick:
        cases, heads, repeats, ratios = "synthetic-small", 1, 1, ratios or "5x,20x"
    chosen = parse_cases(cases)
    heading = (
        shlex.join(["python", "-m", "benchmarks.vs_reference", *sys.argv[1:]]),
        machine(),
    )
    console.rule("[bold]vllm-am against the paper's code")
    console.print(Text(heading[1], style="dim"))
    problems = {case.name: make_heads(case).stored(DTYPES[dtype], heads) for case in chosen}
    descriptions = {
        case.name: f"{describe(case, problems[case.name])} Stored in {dtype}." for case in chosen
    }
    cells = make_cells(chosen, parse_ratios(ratios), parse_threads(threads), names)
    rows = run(console, cells, theirs, problems, repeats)

    for name, description in descriptions.items():
        header, lines = table_of([row for row in rows if row.case == name])
        table = Table(*header, box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for line in lines:
            table.add_row(*line)
        console.print(f"[bold]{name}[/]  ours / the reference's\n{description}", table)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "vs_reference.csv", heading, rows)
    write_markdown(folder / "vs_reference.md", heading, descriptions, rows)
    write_plot(folder / "vs_reference.png", heading[1], rows)
    console.print(written(folder, "vs_reference.md", "vs_reference.csv", "vs_reference.png"))


def run(
    console: Console,
    cells: Sequence[Cell],
    reference: Reference,
    problems: Mapping[str, Heads],
    repeats: int,
) -> list[Row]:
    """Measure all cells, with a progress bar."""
    columns = (
        TextColumn("{task.description:44}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    rows: list[Row] = []
    threads = torch.get_num_threads()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cells))
        for cell in cells:
            progress.update(task, description=f"{cell.name} thread{'s' * (cell.threads > 1)}")
            torch.set_num_threads(cell.threads)
            rows += measure(cell, reference, problems[cell.case.name], repeats)
            progress.advance(task)
    torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    typer.run(main)
