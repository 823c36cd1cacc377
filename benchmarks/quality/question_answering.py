"""QuALITY, LongHealth and RULER through the OpenAI API, with the full cache and compacted.

Either ``vllm serve`` is started here, with compaction on, or ``--url`` names a server that runs.
Ratios are options of the requests, so one server answers all of them; what else a configuration
says (``--config``) belongs to the server.

The ratio is meant for the context alone. The server that is started here is told to leave the
template and the question exact: as many first and last tokens as they take, counted with the
model's own tokenizer. Two things differ from the paper's evaluation, which compacts first and asks
later. The question is in the same request, so its queries are among those of ``context-prefill``;
other query sources have not seen it. And compaction takes effect two steps after the prefill: the
first two tokens of an answer come from the full cache. ``early`` is the share of answers that were
over so soon that this may have decided them; it should be 0, and is why RULER's beginnings of
answers are not used unless ``--answer-prefix`` asks for them. A sequence shorter than the threshold
is not compacted: ``compactions`` says how many were.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.folders import Record, result_path, written
from benchmarks.machine import machine_line
from benchmarks.quality.chat import ChatClient, Reply, Sampling
from benchmarks.quality.datasets import (
    DatasetError,
    Sample,
    load_longhealth,
    load_quality,
    load_ruler,
)
from benchmarks.quality.prompts import Message, messages, score
from benchmarks.serving import HOST, Metrics, Server, ServerError, concurrently
from vllm_am.config import parse_ratio

#: As in the paper's evaluation.
MAX_ANSWER_TOKENS = 2048
#: Answers of at most so many tokens, the end included, are ``early``.
EARLY_TOKENS = 4
#: The context, when only the length of what surrounds it is asked for. No token is shared.
STUBS = ("0 0 0", "x y z")

#: Chat to token ids, by the model's template.
Tokenize = Callable[[list[Message]], list[int]]


@dataclass(frozen=True)
class Answer:
    """What was answered to a sample at one ratio; a line of the log.

    ``run`` says how, see ``Setup.run``.
    """

    run: str
    ratio: float
    sample: str
    task: str
    score: float
    readable: bool
    expected: list[str]
    text: str
    prompt_tokens: int
    completion_tokens: int
    finished: bool


@dataclass(frozen=True)
class Summary:
    """A row of the table.

    Attributes:
        accuracy: mean score; readable: share of answers that could be read at all; early: share of
            compacted answers that the full cache may have decided.
        memory: mean blocks held by a sequence at its end, over those of the full cache; NaN where
            the server does not tell.
        compactions, failures: of all requests; NaN likewise.
    """

    dataset: str
    task: str
    model: str
    config: str
    ratio: float
    samples: int
    accuracy: float
    readable: float
    early: float
    answer_tokens: float
    memory: float
    compactions: float
    failures: float


@dataclass(frozen=True)
class Setup:
    """What all commands have in common."""

    model: str
    ratios: Sequence[float]
    config: Mapping[str, Any]
    sampling: Sampling
    max_tokens: int
    one_turn: bool
    answer_prefix: bool
    concurrency: int
    block_size: int
    output: Path
    url: str | None
    serve_flags: Sequence[str]

    @property
    def run(self) -> str:
        """Everything that answers depend on, beside sample and ratio; JSON."""
        names = ("model", "config", "max_tokens", "one_turn", "answer_prefix", "serve_flags")
        values = {name: getattr(self, name) for name in names} | asdict(self.sampling)
        return json.dumps(values, sort_keys=True)

    def messages(self, sample: Sample) -> list[Message]:
        """The chat of a sample."""
        return messages(sample, self.one_turn, self.answer_prefix)


def exact_tokens(tokenize: Tokenize, sample: Sample, setup: Setup) -> tuple[int, int]:
    """Tokens before and behind the context of a sample, in the model's own template.

    Two prompts that differ in nothing but the context share just these.
    """
    first, second = (tokenize(setup.messages(replace(sample, context=stub))) for stub in STUBS)
    return _common(first, second), _common(first[::-1], second[::-1])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def serve_arguments(samples: Sequence[Sample], tokenize: Tokenize, setup: Setup) -> list[str]:
    """Flags of ``vllm serve``: template and questions stay exact, every context is compacted."""
    around = [exact_tokens(tokenize, sample, setup) for sample in samples]
    contexts = {sample.context: sample for sample in samples}
    lengths = [len(tokenize(setup.messages(s))) for s in contexts.values()]
    config = {
        "protected_tokens": max(before for before, _ in around),
        "recent_tokens": max(1, max(behind for _, behind in around)),
        # What is measured are answers from the compacted cache: every fit in the very next step.
        "step_ms": 1e6,
        **setup.config,
    }
    answer = max(sample.max_tokens or setup.max_tokens for sample in samples)
    return [
        *("--kv-compaction", "attention-matching"),
        *("--kv-compaction-ratio", str(min(setup.ratios))),
        # Questions differ in length: a shorter one must not fall below the threshold.
        *("--kv-compaction-threshold", str(max(1, min(lengths) - config["recent_tokens"]))),
        *("--kv-compaction-config", json.dumps(config)),
        *("--block-size", str(setup.block_size)),
        *("--max-model-len", str(max(lengths) + config["recent_tokens"] + answer)),
        *setup.serve_flags,
    ]


def model_tokenizer(model: str) -> Tokenize:
    """Chat to token ids, by the model's template, as the server will do it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(chat: list[Message]) -> list[int]:
        ends = chat[-1]["role"] == "assistant"
        ids: list[int] = tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=not ends,
            continue_final_message=ends,
            return_dict=False,
        )
        return ids

    return tokenize


@contextmanager
def serving(samples: Sequence[Sample], setup: Setup, console: Console) -> Iterator[ChatClient]:
    """A client of the server that ``--url`` names, or of one that runs for as long as this."""
    if setup.url is not None:
        client = ChatClient(setup.url, setup.model, os.environ.get("OPENAI_API_KEY"))
        try:
            yield client
        finally:
            client.close()
        return
    flags = serve_arguments(samples, model_tokenizer(setup.model), setup)
    log = Path(gettempdir()) / f"vllm-am-quality-{os.getpid()}.log"
    server = Server(setup.model, flags, log)
    console.print(server.command_line())
    with server, console.status("") as status:
        server.wait_until_ready(lambda s: status.update(f"The server is starting ({s:.0f} s) …"))
        status.stop()
        client = ChatClient(f"http://{HOST}:{server.port}", setup.model)
        try:
            yield client
        finally:
            client.close()


def evaluate(
    client: ChatClient,
    samples: Sequence[Sample],
    ratio: float,
    setup: Setup,
    log: AnswerLog,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> tuple[list[Answer], Metrics | None]:
    """Ask what the log has no answer to yet.

    Returns:
        all answers, and what the server's metrics gained; None without metrics, or where the log
        had some of the answers already.
    """
    options = {"kv_compaction": "off"} if ratio == 1 else {"kv_compaction_ratio": ratio}
    missing = [sample for sample in samples if not log.has(setup.run, ratio, sample.id)]
    calls = [
        partial(
            client.ask,
            setup.messages(sample),
            sample.max_tokens or setup.max_tokens,
            setup.sampling,
            options,
            cache_salt=f"{ratio:g}",
        )
        for sample in missing
    ]
    before = client.metrics()
    for index, reply in concurrently(calls, setup.concurrency):
        answer = grade(missing[index], setup.run, ratio, reply)
        log.add(answer)
        on_answer(answer)
    after = client.metrics()
    gained = None
    if before is not None and after is not None and len(missing) == len(samples):
        gained = after.since(before)
    return log.of(setup.run, ratio, samples), gained


def grade(sample: Sample, run: str, ratio: float, reply: Reply) -> Answer:
    """Read and score a reply."""
    points, readable = score(sample, reply.text)
    return Answer(
        run=run,
        ratio=ratio,
        sample=sample.id,
        task=sample.task,
        score=points,
        readable=readable,
        expected=list(sample.answers),
        text=reply.text,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        finished=reply.finished,
    )


class AnswerLog:
    """Answers in a JSON-lines file, appended as they come: to be looked at, and to resume from."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self._answers: dict[tuple[str, float, str], Answer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not fresh:
            for line in path.read_text().splitlines():
                answer = Answer(**json.loads(line))
                self._answers[answer.run, answer.ratio, answer.sample] = answer
        else:
            path.write_text("")

    def has(self, run: str, ratio: float, sample: str) -> bool:
        return (run, ratio, sample) in self._answers

    def add(self, answer: Answer) -> None:
        self._answers[answer.run, answer.ratio, answer.sample] = answer
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")

    def of(self, run: str, ratio: float, samples: Sequence[Sample]) -> list[Answer]:
        return [self._answers[run, ratio, sample.id] for sample in samples]


def summaries(
    dataset: str, setup: Setup, ratio: float, answers: Sequence[Answer], gained: Metrics | None
) -> Iterator[Summary]:
    """A row for every task, and one for all of them if there are several."""
    tasks = list(dict.fromkeys(answer.task for answer in answers))
    for task in tasks + (["all"] if len(tasks) > 1 else []):
        part = [answer for answer in answers if task in ("all", answer.task)]
        # The server counts over all tasks together.
        whole = gained if len(part) == len(answers) else None
        yield Summary(
            dataset=dataset,
            task=task,
            model=setup.model,
            config=json.dumps(setup.config, sort_keys=True),
            ratio=ratio,
            samples=len(part),
            accuracy=_mean([answer.score for answer in part]),
            readable=_mean([float(answer.readable) for answer in part]),
            early=_mean(
                [float(ratio < 1 and answer.completion_tokens <= EARLY_TOKENS) for answer in part]
            ),
            answer_tokens=_mean([float(answer.completion_tokens) for answer in part]),
            memory=1.0 if ratio == 1 else memory_share(part, whole, setup.block_size),
            compactions=_total(whole, "vllm:kv_compaction_compactions_total"),
            failures=_total(whole, "vllm:kv_compaction_failures_total"),
        )


def memory_share(answers: Sequence[Answer], gained: Metrics | None, block_size: int) -> float:
    """Blocks held over blocks without compaction; the last token's KV is never written."""
    full = sum(
        math.ceil((answer.prompt_tokens + answer.completion_tokens - 1) / block_size)
        for answer in answers
    )
    freed = _total(gained, "vllm:kv_compaction_blocks_freed_total")
    return (full - freed) / full if full else math.nan


def _total(gained: Metrics | None, name: str) -> float:
    if gained is None:
        return math.nan
    try:
        return gained.total(name)
    except ServerError:
        return math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# -- files and commands ---------------------------------------------------------------------------

COLUMNS = ("task", "cache", "samples", "accuracy", "readable", "early", "memory", "compactions")


def write_results(path: Path, rows: Sequence[Summary], command: str, machine: str) -> None:
    """CSV, and a table in Markdown beside it."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Summary)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [f"# {rows[0].dataset}, {rows[0].model}", "", f"`{command}`. {machine}.", ""]
    lines += [f"Configuration: `{rows[0].config}`.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    path.with_suffix(".md").write_text("\n".join([*lines, ""]))


def cells(row: Summary) -> list[str]:
    """A line of the table."""

    def shown(value: float, text: str) -> str:
        return "–" if math.isnan(value) else text

    return [
        row.task,
        "full" if row.ratio == 1 else f"{1 / row.ratio:.3g}x",
        str(row.samples),
        f"{row.accuracy:.1%}",
        f"{row.readable:.1%}",
        f"{row.early:.1%}",
        shown(row.memory, f"{row.memory:.1%}"),
        shown(row.compactions, f"{row.compactions:.0f}"),
    ]


def run(
    dataset: str, samples: Sequence[Sample], setup: Setup, fresh: bool, console: Console
) -> list[Summary]:
    """Ask everything at every ratio, the full cache first; write what came out."""
    if not samples:
        raise DatasetError("no samples")
    log = AnswerLog(setup.output.with_suffix(".jsonl"), fresh)
    rows: list[Summary] = []
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    started = time.monotonic()
    with serving(samples, setup, console) as client, Progress(*columns, console=console) as bars:
        for ratio in (1.0, *(r for r in setup.ratios if r < 1)):
            name = "full cache" if ratio == 1 else f"{1 / ratio:.3g}x"
            task = bars.add_task(name, total=len(samples), note="")
            points: list[float] = []

            def advance(answer: Answer, task: Any = task, points: list[float] = points) -> None:
                points.append(answer.score)
                bars.update(task, advance=1, note=f"{_mean(points):.1%}")

            answers, gained = evaluate(client, samples, ratio, setup, log, advance)
            bars.update(task, completed=len(samples))
            rows += summaries(dataset, setup, ratio, answers, gained)
    command = " ".join(["python -m benchmarks.quality", *map(shlex.quote, sys.argv[1:])])
    write_results(setup.output.with_suffix(".csv"), rows, command, machine_line())
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    names = (setup.output.with_suffix(suffix).name for suffix in (".md", ".csv", ".jsonl"))
    place, seconds = written(setup.output.parent, *names), time.monotonic() - started
    console.print(f"{place} It took {seconds:.0f} s.")
    return rows


Data = Annotated[Path, typer.Option(exists=True, help="The dataset's file, as published.")]
Model = Annotated[str, typer.Option(help="Folder or name of a chat model.")]
Ratios = Annotated[str, typer.Option(help="Compaction ratios; the full cache comes first.")]
Config = Annotated[str, typer.Option(help="JSON for --kv-compaction-config of the server.")]
Url = Annotated[str | None, typer.Option(help="A server that runs, without /v1.")]
Greedy = Annotated[bool, typer.Option(help="Instead of the model's generation config.")]
Thinking = Annotated[bool | None, typer.Option(help="enable_thinking of the chat template.")]
Prefix = Annotated[bool, typer.Option(help="Begin answers as the dataset says; see early.")]
OneTurn = Annotated[bool, typer.Option(help="Context and question in one user turn.")]
Seed = Annotated[int, typer.Option(help="Of the samples.")]
MaxTokens = Annotated[int, typer.Option(help="Of an answer, where the dataset does not say.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.")]
BlockSize = Annotated[int, typer.Option(help="Of the server; for memory.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")]
Fresh = Annotated[bool, typer.Option(help="Forget the answers that are there.")]
Output = Annotated[
    Path | None,
    typer.Option(help="Path without suffix.", show_default="benchmarks/out/quality-COMMAND"),
]
Serve = Annotated[list[str] | None, typer.Option(help="A further argument of vllm serve.")]


def _command(dataset: str, load: Callable[..., list[Sample]]) -> Callable[..., None]:
    """The command of a dataset; they differ in how it is read only."""

    def command(
        data: Data,
        model: Model,
        ratio: Ratios = "10x,20x,50x",
        config: Config = "{}",
        url: Url = None,
        greedy: Greedy = False,
        thinking: Thinking = None,
        one_turn: OneTurn = False,
        answer_prefix: Prefix = False,
        seed: Seed = 0,
        max_tokens: MaxTokens = MAX_ANSWER_TOKENS,
        concurrency: Concurrency = 16,
        block_size: BlockSize = 16,
        limit: Limit = None,
        fresh: Fresh = False,
        serve: Serve = None,
        output: Output = None,
        record: Record = False,
    ) -> None:
        console = Console(highlight=False)
        setup = Setup(
            model=model,
            ratios=[parse_ratio(part, "--ratio") for part in ratio.replace(",", " ").split()],
            config=json.loads(config),
            sampling=Sampling(greedy, seed, thinking),
            max_tokens=max_tokens,
            one_turn=one_turn,
            answer_prefix=answer_prefix,
            concurrency=concurrency,
            block_size=block_size,
            output=result_path(output, record, f"quality-{dataset}"),
            url=url,
            serve_flags=serve or [],
        )
        try:
            run(dataset, load(data)[:limit], setup, fresh, console)
        except (DatasetError, ServerError) as error:
            console.print(str(error), style="red", soft_wrap=True, markup=False)
            raise typer.Exit(1) from None

    command.__doc__ = (load.__doc__ or "").splitlines()[0]
    return command


quality = _command("quality", load_quality)
longhealth = _command("longhealth", load_longhealth)
ruler = _command("ruler", load_ruler)
