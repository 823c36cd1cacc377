"""The demonstration: one vLLM server, the same questions under ever smaller KV caches.

``vllm serve`` runs with ``--kv-compaction attention-matching``. Documents of about 2,000 tokens,
which the model was not trained on, are asked about through the OpenAI chat API, first with the full
cache (``kv_compaction: "off"``), then with the document's KV compacted to a half, a fifth and a
tenth: all on the same server, by options of the request. Counts, times and errors are the server's
own: from its ``/metrics``, its log and the ``usage`` of its answers.

How to read it:

- A sequence is compacted once its prompt has been read. Fitting and swapping blocks takes about two
  steps of the engine, in which generation goes on: the first two tokens or so of an answer are
  written with the full cache. The answers are whole sentences that begin with words of the question
  and end in the value asked for, so that the value comes from the compacted cache.
- A document is compacted once, for the first question about it: those that come meanwhile take the
  result over, those that come later begin on it. It is fitted to queries of the document alone. The
  last 64 tokens of the first sequence stay exact, as does the first block.
- The table counts the blocks that one sequence holds when it ends, those included that it shares.
- Modes share no cached prefix (``cache_salt``), so that each of them reads every document once. The
  full cache is shared by vLLM's prefix caching.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.machine import machine_line
from benchmarks.plots import plot_modes
from benchmarks.recall.documents import Document, Question, is_correct, make_document, messages
from benchmarks.serving import Completion, Metrics, Server, ServerError, concurrently
from vllm_am.config import CompactionConfigError, parse_ratio

HERE = Path(__file__).parent
RECALL_MODEL = HERE / "recall" / "model"

BLOCK_SIZE = 32
CONCURRENCY = 8
MAX_ANSWER_TOKENS = 32
#: The share of questions about votes, which need the whole document rather than one place in it.
TALLY_SHARE = 0.25
#: Every fit in the very next step, all eight of them if need be: what is shown are answers from the
#: compacted cache. (The defaults spread the work for the sake of other requests.)
AT_ONCE = {"step_ms": 1e6, "query_pool_share": 0.5}
#: What is promised: at this ratio, at least this share of the full cache's right answers.
PROMISED_RATIO, PROMISED_ACCURACY = 0.1, 0.9

RECALL, TALLY = "recall", "tally"
KINDS = {RECALL: "recall (facts)", TALLY: "tally (votes)"}


class Density(StrEnum):
    """How much of a document is facts."""

    SPARSE = "sparse"
    DENSE = "dense"
    MIXED = "mixed"


@dataclass(frozen=True)
class Task:
    """A question about a document."""

    document: Document
    question: Question


@dataclass(frozen=True)
class Mode:
    """The full cache (``ratio`` None), or a compaction ratio."""

    ratio: float | None

    @property
    def name(self) -> str:
        return "full" if self.ratio is None else f"{1 / self.ratio:.3g}x"

    @property
    def options(self) -> dict[str, str | float]:
        """``vllm_xargs`` of its requests."""
        if self.ratio is None:
            return {"kv_compaction": "off"}
        return {"kv_compaction_ratio": self.ratio}


@dataclass(frozen=True)
class Score:
    """Right answers among those to one kind of question."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else math.nan


@dataclass(frozen=True)
class Result:
    """What one mode did. Means are per sequence, or per compaction where the name says "fit"."""

    mode: Mode
    answers: Sequence[Completion]
    scores: dict[str, Score] | None
    """By kind, or None for a model that was not trained for these questions."""
    seconds: float
    measured: Metrics
    """What the server's metrics gained during this mode."""
    documents: int
    """That were asked about."""

    @property
    def accuracy(self) -> float:
        scores = (self.scores or {}).values()
        return Score(sum(s.right for s in scores), sum(s.asked for s in scores)).share

    @property
    def requests(self) -> int:
        return len(self.answers)

    @property
    def prompt_tokens(self) -> float:
        return sum(a.prompt_tokens for a in self.answers) / self.requests

    @property
    def compactions(self) -> int:
        return round(self.measured.total("vllm:kv_compaction_compactions_total"))

    @property
    def compacted(self) -> int:
        """Sequences that stood on a compacted document, their own or another's."""
        shared = ("cache_adoptions", "cache_hits")
        counts = (self.measured.total(f"vllm:kv_compaction_{name}_total") for name in shared)
        return self.compactions + round(sum(counts))

    @property
    def failures(self) -> dict[str, float]:
        return self.measured.by_label("vllm:kv_compaction_failures_total", "reason")

    @property
    def fit_tokens(self) -> float:
        return self._per_compaction("vllm:kv_compaction_tokens_total")

    @property
    def fit_slots(self) -> float:
        return self._per_compaction("vllm:kv_compaction_slots_total")

    @property
    def fit_seconds(self) -> float:
        return self.measured.mean("vllm:kv_compaction_seconds")

    @property
    def output_error(self) -> float:
        return self.measured.mean("vllm:kv_compaction_output_error")

    @property
    def mass_error(self) -> float:
        return self.measured.mean("vllm:kv_compaction_mass_error")

    @property
    def blocks_before(self) -> float:
        """Blocks a sequence would hold at its end; the last token's KV is never written."""
        tokens = (a.prompt_tokens + a.completion_tokens - 1 for a in self.answers)
        return sum(math.ceil(n / BLOCK_SIZE) for n in tokens) / self.requests

    @property
    def blocks_after(self) -> float:
        if not self.compactions:
            return self.blocks_before
        freed = self._per_compaction("vllm:kv_compaction_blocks_freed_total")
        return self.blocks_before - freed * self.compacted / self.requests

    @property
    def memory_ratio(self) -> float:
        return self.blocks_before / self.blocks_after

    @property
    def tokens_per_second(self) -> float:
        return self.measured.total("vllm:generation_tokens_total") / self.seconds

    def _per_compaction(self, counter: str) -> float:
        return self.measured.total(counter) / self.compactions if self.compactions else math.nan


# -- questions ------------------------------------------------------------------------------------


def make_tasks(documents: int, tokens: int, density: Density, questions: int) -> list[Task]:
    """The first ``questions`` questions (0: all) about each of the first held-out documents."""
    tasks = []
    for seed in range(documents):
        kinds = (Density.SPARSE, Density.DENSE) if density is Density.MIXED else (density,)
        document = make_document(seed, tokens, kinds[seed % len(kinds)].value)
        tasks += [Task(document, q) for q in _choose(document.questions, questions)]
    return tasks


def _choose(questions: Sequence[Question], count: int) -> list[Question]:
    by_kind = {kind: [q for q in questions if q.kind == kind] for kind in KINDS}
    count = count or len(questions)
    tallies = by_kind[TALLY][: math.ceil(TALLY_SHARE * count)]
    return by_kind[RECALL][: count - len(tallies)] + tallies


def ask(server: Server, mode: Mode, tasks: Sequence[Task], scored: bool, bar: ModeBar) -> Result:
    """Put all questions to the server in one mode."""
    calls = [
        partial(
            server.chat,
            messages(task.document, task.question),
            max_tokens=MAX_ANSWER_TOKENS,
            options=mode.options,
            cache_salt=mode.name,
        )
        for task in tasks
    ]
    before, started = server.metrics(), time.monotonic()
    answers: dict[int, Completion] = {}
    for index, answer in concurrently(calls, CONCURRENCY):
        answers[index] = answer
        bar.advance(scored and is_correct(tasks[index].question, answer.text))
    seconds = time.monotonic() - started
    ordered = [answers[i] for i in range(len(tasks))]
    scores = grade(tasks, ordered) if scored else None
    documents = len({task.document.text for task in tasks})
    return Result(mode, ordered, scores, seconds, server.metrics().since(before), documents)


def grade(tasks: Sequence[Task], answers: Sequence[Completion]) -> dict[str, Score]:
    """Right answers by kind of question."""
    scores = {}
    for kind in KINDS:
        pairs = [(t, a) for t, a in zip(tasks, answers, strict=True) if t.question.kind == kind]
        right = sum(is_correct(task.question, answer.text) for task, answer in pairs)
        scores[kind] = Score(right, len(pairs))
    return scores


@dataclass
class ModeBar:
    """A mode's line in the progress display."""

    progress: Progress
    name: str
    total: int
    scored: bool
    right: int = 0

    def __post_init__(self) -> None:
        label = "full cache" if self.name == "full" else f"{self.name} compacted"
        self.task = self.progress.add_task(label, total=self.total, start=False, note="")

    def start(self) -> None:
        self.progress.start_task(self.task)

    def advance(self, right: bool) -> None:
        self.right += right
        note = f"{self.right} right" if self.scored else ""
        self.progress.update(self.task, advance=1, note=note)


# -- what came out --------------------------------------------------------------------------------

Row = tuple[str, list[str]]


def table_rows(results: Sequence[Result]) -> Iterator[tuple[str, list[Row]]]:
    """(heading, rows) of the final table; a cell for each mode."""
    full = results[0]

    def row(label: str, cells: Iterable[str]) -> Row:
        return label, [cell if "nan" not in cell else "–" for cell in cells]

    if full.scores is not None:
        yield (
            "Right answers",
            [
                *(row(label, (_score(r, kind) for r in results)) for kind, label in KINDS.items()),
                row("together", (f"{r.accuracy:.1%}" for r in results)),
                row("relative to the full cache", (f"{_relative(r, full):.1%}" for r in results)),
            ],
        )
    yield (
        "KV cache of a sequence",
        [
            row("prompt tokens", (f"{r.prompt_tokens:,.0f}" for r in results)),
            row("compactions", (f"{r.compactions}" for r in results)),
            row("sequences compacted", (f"{r.compacted} of {r.requests}" for r in results)),
            row("tokens compacted", (f"{r.fit_tokens:,.0f}" for r in results)),
            row("… to slots per head", (f"{r.fit_slots:,.0f}" for r in results)),
            row("blocks without compaction", (f"{r.blocks_before:.1f}" for r in results)),
            row("blocks held", (f"{r.blocks_after:.1f}" for r in results)),
            row("whole sequence, smaller by", (f"{r.memory_ratio:.2f}x" for r in results)),
        ],
    )
    yield (
        "Fit, and speed",
        [
            row("time per compaction", (f"{1e3 * r.fit_seconds:,.0f} ms" for r in results)),
            row("held-out error: output", (f"{r.output_error:.3f}" for r in results)),
            row("held-out error: mass", (f"{r.mass_error:.3f}" for r in results)),
            row("answer tokens/s", (f"{r.tokens_per_second:.1f}" for r in results)),
        ],
    )


def _score(result: Result, kind: str) -> str:
    score = (result.scores or {})[kind]
    return f"{score.right} of {score.asked}"


def _relative(result: Result, full: Result) -> float:
    return result.accuracy / full.accuracy if full.accuracy else math.nan


def result_table(results: Sequence[Result]) -> Table:
    """The final table, for a terminal 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("")
    for result in results:
        table.add_column(result.mode.name, justify="right", min_width=8)
    for number, (heading, rows) in enumerate(table_rows(results)):
        if number:
            table.add_row()
        table.add_row(Text(heading, style="bold cyan"))
        for label, cells in rows:
            strong = label in ("together", "whole sequence, smaller by")
            table.add_row(f"  {label}", *cells, style="bold" if strong else "")
    return table


def answer_tables(tasks: Sequence[Task], results: Sequence[Result]) -> Iterator[tuple[Text, Table]]:
    """One question of each kind about the first document, and a table of every mode's answer."""
    for index in shown_tasks(tasks):
        question = tasks[index].question
        table = Table(box=None, show_header=False, padding=(0, 2))
        table.add_column(style="dim", min_width=5)
        table.add_column()
        for result in results:
            text = result.answers[index].text
            style = ""
            if result.scores is not None:
                style = "green" if is_correct(question, text) else "red"
            table.add_row(result.mode.name, Text(text, style=style))
        heading = Text.assemble((question.text, "bold"), (f"   (right: {question.value})", "dim"))
        yield heading, table


def shown_tasks(tasks: Sequence[Task]) -> list[int]:
    """The first question of each kind; not chosen by how it was answered."""
    kinds = [task.question.kind for task in tasks]
    return [kinds.index(kind) for kind in KINDS if kind in kinds]


def compaction_log_line(server: Server, result: Result) -> str | None:
    """The engine's line about a compaction in this mode, best one whose blocks nobody shared."""
    ids = [answer.request_id for answer in result.answers]
    lines = server.log_lines("KV compaction: request")
    lines = [line for line in lines if any(request_id in line for request_id in ids)]
    lines.sort(key=lambda line: "still shared" in line)
    return lines[0][lines[0].index("KV compaction:") :] if lines else None


def find_problems(results: Sequence[Result]) -> list[str]:
    """What must not be in a demonstration that worked."""
    problems = []
    full = results[0]
    for result in results:
        due = 0 if result.mode.ratio is None else result.requests
        if result.compacted != due or result.compactions > min(due, result.documents):
            failures = "".join(f"; {n:.0f} failed: {why}" for why, n in result.failures.items())
            problems.append(
                f"{result.mode.name}: {result.compacted} of {result.requests} sequences are "
                f"compacted, in {result.compactions} compactions of {result.documents} documents; "
                f"expected {due}{failures}"
            )
        if result.mode.ratio != PROMISED_RATIO or result.scores is None:
            continue
        if not (relative := _relative(result, full)) >= PROMISED_ACCURACY:
            problems.append(
                f"{result.mode.name}: {relative:.1%} of the full cache's accuracy "
                f"({result.accuracy:.1%} against {full.accuracy:.1%}), promised are "
                f"{PROMISED_ACCURACY:.0%}"
            )
    return problems


# -- files ----------------------------------------------------------------------------------------


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """A row per mode, unrounded enough to compute with."""
    rows = []
    for result in results:
        row: dict[str, object] = {"cache": result.mode.name, "ratio": result.mode.ratio or 1.0}
        for kind, score in (result.scores or {}).items():
            row |= {f"{kind}_right": score.right, f"{kind}_asked": score.asked}
        numbers = {
            "accuracy": result.accuracy,
            "requests": result.requests,
            "compactions": result.compactions,
            "sequences_compacted": result.compacted,
            "prompt_tokens": result.prompt_tokens,
            "tokens_compacted": result.fit_tokens,
            "slots_per_head": result.fit_slots,
            "blocks_before": result.blocks_before,
            "blocks_after": result.blocks_after,
            "memory_ratio": result.memory_ratio,
            "compaction_ms": 1e3 * result.fit_seconds,
            "output_error": result.output_error,
            "mass_error": result.mass_error,
            "tokens_per_second": result.tokens_per_second,
        }
        row |= {k: "" if math.isnan(v) else round(v, 4) for k, v in numbers.items()}
        rows.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(
    path: Path,
    results: Sequence[Result],
    tasks: Sequence[Task],
    server: Server,
    machine: str,
    log_line: str | None,
) -> None:
    """The table, how it came about, and an example."""
    modes = [result.mode.name for result in results]
    documents = len({task.document.text for task in tasks})
    lines = [
        "# Demonstration",
        "",
        f"`{' '.join(['python -m benchmarks.demo', *map(shlex.quote, sys.argv[1:])])}`: "
        f"{len(tasks)} questions about {documents} held-out documents under each cache, "
        "one server:",
        "",
        "```",
        server.command_line(),
        "```",
        "",
        f"{machine}.",
        "",
        f"| | {' | '.join(modes)} |",
        f"|---|{'---:|' * len(modes)}",
    ]
    for heading, rows in table_rows(results):
        lines.append(f"| **{heading}** |{' |' * len(modes)}")
        lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows]
    lines += ["", "![Right answers and KV blocks](demo.png)", ""]
    for index in shown_tasks(tasks):
        lines += [f"*{tasks[index].question.text}*", ""]
        lines += [f"- {result.mode.name}: {result.answers[index].text}" for result in results]
        lines.append("")
    if log_line:
        lines += ["One compaction in the server's log:", "", "```", log_line, "```", ""]
    lines += ["How to read it: the docstring of `benchmarks/demo.py`.", ""]
    path.write_text("\n".join(lines))


def write_plot(path: Path, results: Sequence[Result], machine: str) -> None:
    """Accuracy and blocks against the ratio."""
    full = results[0]
    accuracy, promise = {}, None
    if full.scores is not None:
        accuracy["together"] = [r.accuracy for r in results]
        for kind, label in KINDS.items():
            accuracy[label] = [(r.scores or {})[kind].share for r in results]
        promise = (PROMISED_ACCURACY * full.accuracy, f"{PROMISED_ACCURACY:.0%} of the full cache")
    modes = [r.mode.name for r in results]
    plot_modes(path, machine, modes, [r.blocks_after for r in results], accuracy, promise)


# -- the demonstration ----------------------------------------------------------------------------


def serve_flags(tokens: int, scored: bool) -> list[str]:
    """Arguments of ``vllm serve`` for documents of about ``tokens`` tokens."""
    # A document is over the threshold; what a compacted one leaves exact is not. Tokenizers with
    # smaller pieces than words make more tokens of it: there is room for half as many again.
    max_model_len = max(8192, tokens * 3 // 2 + 1024)
    return [
        *("--kv-compaction", "attention-matching", "--kv-compaction-ratio", "0.1"),
        *("--kv-compaction-threshold", str(tokens // 2)),
        *("--kv-compaction-config", json.dumps(AT_ONCE)),
        *("--block-size", str(BLOCK_SIZE), "--max-model-len", str(max_model_len)),
        *("--dtype", "float32" if scored else "auto"),
        "--enforce-eager",
    ]


def parse_modes(text: str) -> list[Mode]:
    """The full cache, then the ratios of a list such as ``2x,5x,0.1``."""
    try:
        ratios = [parse_ratio(part, "--ratios") for part in text.replace(",", " ").split()]
    except CompactionConfigError as error:
        raise typer.BadParameter(str(error)) from None
    if not ratios or max(ratios) == 1:
        raise typer.BadParameter(f"--ratios={text!r}: expected ratios below 1, such as 2x,5x,10x")
    return [Mode(None), *(Mode(ratio) for ratio in ratios)]


def introduce(console: Console, tasks: Sequence[Task], modes: Sequence[Mode]) -> None:
    """Show what will be asked."""
    document = tasks[0].document
    excerpt = Text(document.text.split("\n\n")[0] + " …")
    console.print(
        Panel(excerpt, title="The first document begins", title_align="left", border_style="dim")
    )
    console.print("Questions about it, for example:")
    for index in shown_tasks(tasks):
        console.print(f"  [bold]{tasks[index].question.text}[/]")
    documents = len({task.document.text for task in tasks})
    console.print(
        f"\n{len(tasks)} questions about {documents} documents, {CONCURRENCY} at a time, under "
        f"{len(modes)} caches: {', '.join(mode.name for mode in modes)}\n"
    )


def main(
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents.")] = 4,
    tokens: Annotated[int, typer.Option(min=600, max=14000, help="Tokens per document.")] = 2000,
    questions: Annotated[
        int, typer.Option(min=0, help="Questions per document; 0 for all it answers.")
    ] = 12,
    density: Annotated[Density, typer.Option(help="Facts per document.")] = Density.MIXED,
    ratios: Annotated[
        str, typer.Option(help="Compaction ratios; 5x keeps 0.2.")
    ] = "5x,10x,20x,50x",
    port: Annotated[int | None, typer.Option(help="Loopback port; default: a free one.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A chat model; accuracy is for the bundled one only.")
    ] = None,
    output: Folder = None,
    record: Record = False,
) -> None:
    """Serve a model with KV compaction and ask it questions under ever smaller caches."""
    # So that the server is stopped then, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = Console(highlight=False)
    folder = result_path(output, record)
    modes = parse_modes(ratios)
    scored = model is None or Path(model).resolve() == RECALL_MODEL
    name = os.path.relpath(RECALL_MODEL) if model is None or scored else model
    tasks = make_tasks(documents, tokens, density, questions)
    started, machine = time.monotonic(), machine_line()
    log = Path(gettempdir()) / f"vllm-am-demo-{os.getpid()}.log"
    # The KV pool of the CPU engine, in GiB; a GPU engine ignores it.
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    server = Server(name, serve_flags(tokens, scored), log, env, port)
    console.rule("[bold]vllm-am: one server, ever smaller KV caches")
    console.print(Text(machine, style="dim"))
    console.print()
    console.print(Syntax(server.command_line(), "bash", background_color="default"))
    console.print()
    try:
        results, log_line = run(console, server, modes, tasks, scored)
    except ServerError as error:
        console.print(Text(f"\n{error}", style="red"), soft_wrap=True)
        raise typer.Exit(1) from None

    for heading, table in answer_tables(tasks, results):
        console.print("", heading, table, sep="\n")
    if log_line:
        console.print("\nOne compaction in the server's log:")
        console.print(Padding(Text(log_line, style="dim"), (0, 2)))
    console.print(result_table(results))
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "demo.csv", results)
    write_plot(folder / "demo.png", results, machine)
    write_markdown(folder / "demo.md", results, tasks, server, machine, log_line)
    place, seconds = written(folder, "demo.md", "demo.csv", "demo.png"), time.monotonic() - started
    console.print(f"{place} It took {seconds:.0f} s.")
    if problems := find_problems(results):
        for problem in problems:
            console.print(Text(f"NOT AS IT SHOULD BE: {problem}", style="bold red"))
        console.print(f"The server's log: {log}")
        raise typer.Exit(1)
    log.unlink()


def run(
    console: Console, server: Server, modes: Sequence[Mode], tasks: Sequence[Task], scored: bool
) -> tuple[list[Result], str | None]:
    """Start the server, ask everything, stop it; results, and a line of its log.

    The line is about a compaction at the promised ratio, or at the last.
    """
    with server:
        with console.status("") as status:
            seconds = server.wait_until_ready(
                lambda seconds: status.update(f"The server is starting ({seconds:.0f} s) …")
            )
        console.print(f"The server is ready after {seconds:.0f} s. Its log says:")
        for line in server.log_lines("KV compaction is on:"):
            text = line[line.index("KV compaction is on:") :]
            console.print(Padding(Text(text, style="dim"), (0, 2, 1, 2)))
        introduce(console, tasks, modes)
        columns = (
            TextColumn("{task.description:15}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as progress:
            bars = [ModeBar(progress, mode.name, len(tasks), scored) for mode in modes]
            results = []
            for mode, bar in zip(modes, bars, strict=True):
                bar.start()
                results.append(ask(server, mode, tasks, scored, bar))
        example = next((r for r in results if r.mode.ratio == PROMISED_RATIO), results[-1])
        return results, compaction_log_line(server, example)


if __name__ == "__main__":
    typer.run(main)
