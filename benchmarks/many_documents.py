"""Questions about the same documents: shared compactions against stock vLLM's prefix caching.

    python -m benchmarks.many_documents [one] [many] [answers] [saved]

``one``: twelve questions about one document one after the other, and eight at once: compactions,
CPU time of a later question, blocks in use. ``many``: ten questions about each of up to 40
documents in random order, and a pool for six whole ones: stock vLLM keeps some of them and reads
the others again, compacted ones all fit. ``answers``: right answers on compactions of others
against those on the sequence's own. ``saved``: the first token of the first question about a
document, in a new server that has loaded it, and in one that has to read it. Each runs
``vllm serve`` on the same requests, one set-up after the other.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir
from typing import Annotated

import psutil
import typer
from rich.console import Console

from benchmarks.demo import BLOCK_SIZE, RECALL_MODEL, Density, Mode, Task, grade, make_tasks
from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.plots import plot_lines
from benchmarks.recall.documents import messages
from benchmarks.serving import Completion, Metrics, Server, ServerError, concurrently

TOKENS = 2000
MAX_MODEL_LEN = 4096
MAX_ANSWER_TOKENS = 32
AT_ONCE = 8
#: Blocks of a whole document with a question and its answer.
WHOLE = math.ceil((TOKENS + 100) / BLOCK_SIZE)
#: Whole documents that the small pool holds.
POOL_DOCUMENTS = 6
#: Where operators name, save and drop prefixes.
PREFIXES = "/v1/kv_compaction/prefixes"
#: Seconds between two looks at the pool.
LOOK_SECONDS = 0.02
#: Times that a question is asked whose blocks are looked at.
LOOKS = 10
#: For compactions that go on for others when the last answer is there.
SETTLE_SECONDS = 120


class Setup(StrEnum):
    """What serves."""

    STOCK = "stock"
    ALONE = "compaction, not shared"
    SHARED = "compaction, shared"
    MARKED = "compaction, shared, marked"
    """Requests say where the document ends, which others are going to ask about."""

    def flags(self, ratio: float) -> list[str]:
        """Arguments of ``vllm serve`` besides the common ones."""
        if self is Setup.STOCK:
            return ["--enable-prefix-caching"]
        return [
            *("--kv-compaction", "attention-matching", "--kv-compaction-ratio", f"{ratio:g}"),
            *("--kv-compaction-threshold", str(TOKENS // 2)),
            *("--kv-compaction-cache", "off" if self is Setup.ALONE else "on"),
        ]


@dataclass(frozen=True)
class Size:
    """How much is asked."""

    tokens: int = TOKENS
    one: int = 12
    rounds: int = 6
    documents: tuple[int, ...] = (2, 4, 6, 8, 12, 20, 40)
    questions: int = 10
    answered_documents: int = 12
    answered_questions: int = 20
    saved: int = 6
    ratios: tuple[float, ...] = (0.1, 0.05, 0.02)


FULL = Size()
#: To try the code.
SMOKE = Size(
    one=3,
    rounds=1,
    documents=(2,),
    questions=2,
    answered_documents=1,
    answered_questions=4,
    saved=1,
    ratios=(0.05,),
)


@contextmanager
def serving(
    setup: Setup, blocks: int, ratio: float = 0.05, config: Sequence[str] = ()
) -> Iterator[Server]:
    """A server, ready; its log is kept if something goes wrong."""
    log = Path(gettempdir()) / f"vllm-am-many-documents-{os.getpid()}.log"
    flags = [
        *setup.flags(ratio),
        *config,
        *("--block-size", str(BLOCK_SIZE), "--max-model-len", str(MAX_MODEL_LEN)),
        *("--num-gpu-blocks-override", str(blocks + 1)),
        *("--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details"),
    ]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "vllm_am"}
    with Server(os.path.relpath(RECALL_MODEL), flags, log, env) as server:
        server.wait_until_ready()
        yield server
    log.unlink()


def messages_of(task: Task) -> list[dict[str, str]]:
    """A document with a question behind it."""
    return messages(task.document, task.question)


def ask(server: Server, task: Task, mode: Mode | None = None, **options: str | int) -> Completion:
    """Put one question."""
    return server.chat(
        messages_of(task),
        max_tokens=MAX_ANSWER_TOKENS,
        options={**(mode.options if mode else {}), **options},
        cache_salt=mode.name if mode else None,
    )


def mark(server: Server, task: Task) -> dict[str, int]:
    """What a request says about its document, to have it compacted for others at once."""
    document = [{"role": "user", "content": task.document.text}]
    tokens = server.post("/tokenize", {"messages": document, "add_generation_prompt": False})
    return {"kv_compaction_prefix_tokens": tokens["count"] - 2}  # less the end of the message


def right(tasks: Sequence[Task], answers: Sequence[Completion]) -> float:
    """Share of right answers."""
    return sum(s.right for s in grade(tasks, answers).values()) / len(tasks)


def cpu_seconds(server: Server) -> float:
    """Of all processes of a server so far."""
    root = psutil.Process(server.pid)
    times = [p.cpu_times() for p in (root, *root.children(recursive=True))]
    return sum(t.user + t.system for t in times)


@dataclass
class Peak:
    """Most blocks in use while it is looked at."""

    server: Server
    blocks: int
    most: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            share = self.server.metrics().total("vllm:kv_cache_usage_perc")
            self.most = max(self.most, round(share * self.blocks))


def settled(setup: Setup, server: Server) -> Metrics:
    """The metrics once no compaction is under way; some outlast the request that began them."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        metrics = server.metrics()
        if setup is Setup.STOCK or not metrics.total("vllm:kv_compaction_fits_running"):
            return metrics
        if time.monotonic() > until:
            raise ServerError(f"a compaction is still under way after {SETTLE_SECONDS} s")
        time.sleep(LOOK_SECONDS)


def compactions(setup: Setup, gained: Metrics) -> int:
    """Fits that took place."""
    if setup is Setup.STOCK:
        return 0
    return round(gained.total("vllm:kv_compaction_compactions_total"))


# -- one document ---------------------------------------------------------------------------------


def one_document(size: Size) -> Iterator[Row]:
    """Questions about one document one after the other, then about others, of each all at once."""
    tasks = make_tasks(1 + size.rounds, size.tokens, Density.SPARSE, size.one)
    first, *rounds = (list(group) for _, group in groupby(tasks, lambda task: task.document.text))
    rounds = [group[:AT_ONCE] for group in rounds]
    blocks = (AT_ONCE + 2) * WHOLE
    stock: dict[str, float] = {}
    for setup in Setup:
        with serving(setup, blocks) as server:
            before, answers, spent = server.metrics(), [ask(server, first[0])], cpu_seconds(server)
            answers += [ask(server, task) for task in first[1:]]
            later = (cpu_seconds(server) - spent) / (len(first) - 1)
            gained = settled(setup, server).since(before)
            with Peak(server, blocks) as one:
                for _ in range(LOOKS):  # one may be over between two looks
                    ask(server, first[0])
            stock.setdefault("later", later)
            stock.setdefault("one", one.most)
            yield {
                "work": f"{len(first)} questions, one after the other",
                "server": setup.value,
                "compactions": compactions(setup, gained),
                "CPU s of a later question": later,
                "of stock's": later / stock["later"],
                "blocks in use, later question": one.most,
                "blocks of stock's": one.most / stock["one"],
                "right": right(first, answers),
            }
            before = server.metrics()
            shares = []
            with Peak(server, blocks) as peak:
                for group in rounds:
                    calls = [partial(ask, server, task) for task in group]
                    found = dict(concurrently(calls, AT_ONCE))
                    shares.append(right(group, [found[i] for i in range(len(group))]))
            done = compactions(setup, settled(setup, server).since(before))
            yield {
                "work": f"{len(rounds[0])} questions at once, mean of {len(rounds)} documents",
                "server": setup.value,
                "compactions": done / len(rounds),
                "peak blocks": peak.most,
                "of whole documents": peak.most / (len(rounds[0]) * WHOLE),
                "right": sum(shares) / len(shares),
            }


# -- many documents -------------------------------------------------------------------------------


def many_documents(size: Size) -> Iterator[Row]:
    """Requests per second by the number of documents, in a pool for few of them."""
    for documents in size.documents:
        tasks = make_tasks(documents, size.tokens, Density.SPARSE, size.questions)
        random.Random(documents).shuffle(tasks)
        rates = {}
        for setup in (Setup.STOCK, Setup.SHARED, Setup.MARKED):
            with serving(setup, POOL_DOCUMENTS * WHOLE) as server:
                marks = [mark(server, task) if setup is Setup.MARKED else {} for task in tasks]
                calls = [
                    partial(ask, server, task, None, **options)
                    for task, options in zip(tasks, marks, strict=True)
                ]
                before, started = server.metrics(), time.monotonic()
                found = dict(concurrently(calls, AT_ONCE))
                seconds = time.monotonic() - started
                gained = settled(setup, server).since(before)
            rates[setup] = len(tasks) / seconds
            cached = gained.total("vllm:prefix_cache_hits_total")
            yield {
                "documents": documents,
                "questions": len(tasks),
                "server": setup.value,
                "requests/s": rates[setup],
                "of stock's": rates[setup] / rates[Setup.STOCK],
                "compactions": compactions(setup, gained),
                "prompt tokens from the cache": cached
                / gained.total("vllm:prefix_cache_queries_total"),
                "right": right(tasks, [found[i] for i in range(len(tasks))]),
            }


# -- answers --------------------------------------------------------------------------------------


def answers(size: Size) -> Iterator[Row]:
    """Right answers by ratio: with the full cache, on own compactions, on those of others."""
    tasks = make_tasks(size.answered_documents, size.tokens, Density.MIXED, size.answered_questions)
    # Whole fits at once: what is measured are answers from compacted caches, from the start.
    at_once = ("--kv-compaction-config", '{"step_ms": 1e6}')
    with serving(Setup.SHARED, (AT_ONCE + 2) * WHOLE, config=at_once) as server:
        for mode in (Mode(None), *map(Mode, size.ratios)):
            for own in (True, False):
                if mode.ratio is None and not own:
                    continue
                options = {} if mode.ratio is None or not own else {"kv_compaction_cache": "off"}
                calls = [partial(ask, server, task, mode, **options) for task in tasks]
                before = server.metrics()
                found = dict(concurrently(calls, AT_ONCE))
                gained = settled(Setup.SHARED, server).since(before)
                scores = grade(tasks, [found[i] for i in range(len(tasks))])
                yield {
                    "cache": mode.name,
                    "compactions": round(gained.total("vllm:kv_compaction_compactions_total")),
                    "of": "" if mode.ratio is None else "each its own" if own else "shared",
                    "questions": len(tasks),
                    **{kind: score.share for kind, score in scores.items()},
                    "right": sum(s.right for s in scores.values()) / len(tasks),
                }


# -- saved prefixes -------------------------------------------------------------------------------


def saved_prefixes(size: Size) -> Iterator[Row]:
    """Time to the first token of a question about a document that the server has not seen."""
    warm, *documents = make_tasks(1 + size.saved, size.tokens, Density.SPARSE, 1)
    blocks = (size.saved + 2) * WHOLE
    with TemporaryDirectory() as folder:
        files = []
        config = ("--kv-compaction-config", json.dumps({"prefix_folder": folder}))
        with serving(Setup.SHARED, blocks, config=config) as server:
            for number, task in enumerate(documents):
                name = f"document-{number}"
                messages = [{"role": "user", "content": task.document.text}]
                server.post(PREFIXES, {"name": name, "messages": messages})
                files.append(server.post(f"{PREFIXES}/{name}/save", {})["file"])
                server.delete(f"{PREFIXES}/{name}")
        read: list[float] = []
        for setup in (Setup.STOCK, Setup.SHARED):
            loaded = ("--kv-compaction-preload", *files) if setup is Setup.SHARED else ()
            with serving(setup, blocks, config=loaded) as server:
                ask(server, warm)
                before = server.metrics()
                seconds, answers = [], []
                for task in documents:
                    started = time.perf_counter()
                    server.chat(messages_of(task), max_tokens=1)
                    seconds.append(time.perf_counter() - started)
                    answers.append(ask(server, task))
                gained = server.metrics().since(before)
            read = read or seconds
            yield {
                "server": setup.value if setup is Setup.STOCK else "compaction, loaded",
                "documents": len(documents),
                "median first token, ms": 1e3 * median(seconds),
                "of stock's": median(seconds) / median(read),
                "prompt tokens computed": gained.total("vllm:prompt_tokens_total")
                - gained.total("vllm:prefix_cache_hits_total"),
                "MB of each file": 0.0
                if setup is Setup.STOCK
                else median(os.path.getsize(file) for file in files) / 1e6,
                "right": right(documents, answers),
            }


def reports(size: Size) -> dict[str, Report]:
    """The tables by what is measured."""
    cpu = "CPU build, bundled model, 20x where nothing else is said; blocks of 32 tokens."
    return {
        "one": Report(
            "many_documents_one",
            "Questions about one document",
            one_document(size),
            [cpu, "CPU time is of all processes of the server, the API server included."],
        ),
        "many": Report(
            "many_documents",
            "Questions about many documents",
            many_documents(size),
            [
                cpu,
                f"{size.questions} questions about each document in random order, {AT_ONCE} at a "
                f"time; the pool holds {POOL_DOCUMENTS} whole documents. An answer ends before a "
                "compaction of its own would pay: a document is compacted when a second request "
                "begins with it, or, marked (`kv_compaction_prefix_tokens`), with the first.",
            ],
        ),
        "answers": Report(
            "many_documents_answers",
            "Answers on shared compactions",
            answers(size),
            [
                "Own compactions see the question; shared ones do not: they are fitted to queries "
                "of the document alone. Whole fits in one step (step_ms 1e6).",
            ],
        ),
        "saved": Report(
            "many_documents_saved",
            "The first question about a saved document",
            saved_prefixes(size),
            [
                f"{cpu} Documents of about {size.tokens} tokens, one question each, one after the "
                "other; what a document's own question adds is computed by both.",
            ],
        ),
    }


def main(
    parts: Annotated[
        list[str] | None, typer.Argument(help="one, many, answers, saved; default: all.")
    ] = None,
    out: Folder = None,
    record: Record = False,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, to try the code.")] = False,
) -> None:
    """Measure; write ``many_documents*.{csv,md}`` and a plot."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = Console(highlight=False)
    folder = result_path(out, record)
    tables = reports(SMOKE if smoke else FULL)
    if unknown := sorted(set(parts or ()) - set(tables)):
        raise typer.BadParameter(f"{unknown[0]!r}: expected {', '.join(tables)}")
    for name in parts or tables:
        with console.status(f"{tables[name].title} …"):
            tables[name].write(folder)
        console.print((folder / f"{tables[name].name}.md").read_text())
        if name == "many":
            plot(folder)
    console.print(written(folder, *(f"{tables[name].name}.md" for name in parts or tables)))


def plot(folder: Path) -> None:
    """Requests per second against the number of documents."""
    lines: dict[str, list[tuple[float, float]]] = {}
    with (folder / "many_documents.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            point = float(row["documents"]), float(row["requests/s"])
            lines.setdefault(row["server"], []).append(point)
    plot_lines(
        folder / "many_documents.png",
        f"A pool for {POOL_DOCUMENTS} whole documents",
        lines,
        x="documents asked about",
        y="requests/s",
    )


if __name__ == "__main__":
    typer.run(main)
