"""Hours of a server's life in minutes: everything that clients do, right and wrong, all at once.

    python -m benchmarks.soak --seconds 600 --api-servers 1 --api-servers 2 --stock

Requests of all lengths, many on a shared prefix, with options of their own, some of them wrong;
clients that hang up. Among them *bystanders*: greedy requests with compaction off, whose answers
must be those of stock vLLM, token for token. The pool is small, so that sequences are preempted.

At the end nothing may be held, nothing may have grown over the last half, every answer must have
been what was asked for, and the log must hold no error that a client caused. The table says so; the
exit status is 1 where it does not.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.serving import HOST, Server, ServerError

MODEL = Path(__file__).parent / "recall" / "model"
#: The pool holds three of the longest sequences.
LONGEST, BLOCKS, BLOCK = 1900, 193, 32
SERVER = [
    *("--max-model-len", "2048", "--num-gpu-blocks-override", str(BLOCKS)),
    *("--block-size", str(BLOCK), "--dtype", "float32", "--served-model-name", "soak"),
    *("--max-num-seqs", "16", "--max-num-batched-tokens", "1024", "--enforce-eager"),
]
COMPACTION = [
    *("--kv-compaction", "attention-matching", "--kv-compaction-ratio", "10x"),
    *(
        "--kv-compaction-threshold",
        "512",
        "--kv-compaction-config",
        '{"recent_tokens": 32, "step_ms": 50}',
    ),
]
#: oneDNN keeps up to 1,024 kernels that it has compiled, one for each shape that it has met, and
#: its memory grows with them for longer than this lasts. With few, nothing but leaks is seen.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}

#: Kinds of processes; on a CPU the worker is one of its own.
ENGINE, WORKER, OTHERS = "engine", "worker", "front ends"
#: Clients at a time, and the share of requests that are bystanders, wrong, given up.
CLIENTS, BYSTANDERS, WRONG, ABORTED = 12, 0.2, 0.1, 0.2
#: Options of the others.
RIGHT: Sequence[dict[str, Any]] = (
    {},
    {},
    {"kv_compaction": "off"},
    {"kv_compaction_ratio": "5x"},
    {"kv_compaction_ratio": 0.02},
    {"kv_compaction_threshold": 800},
)
NONSENSE: Sequence[dict[str, Any]] = (
    {"kv_compaction": "sideways"},
    {"kv_compaction_ratio": "0"},
    {"kv_compaction_ratio": 7},
    {"kv_compaction_threshold": "80%"},
    {"kv-compaction": "off"},
)
#: Resident memory of all processes may grow by so much over the last half of a life of so many
#: seconds; a shorter one is all warm-up.
GROWTH, GROWN_UP = 0.02, 300
#: In MiB where that is more: what two median readings of the same server differ by.
NOISE = 16
#: Errors in the log of a server that does not answer any more.
FIRST_LINES = 100


@dataclass(frozen=True)
class Ask:
    """A request to ``/v1/completions``."""

    prompt: tuple[int, ...]
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    given_up_after: float | None = None
    """Seconds after which the client hangs up."""

    def body(self) -> dict[str, Any]:
        return {
            "model": "soak",
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": self.stream,
            **({"vllm_xargs": self.options} if self.options else {}),
        }


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(5, 300) for _ in range(count))


def bystanders() -> list[Ask]:
    """The requests whose answers are known; they share no prefix with others."""
    rng = random.Random(1)
    return [Ask(tokens(rng, 60 + 90 * i), 24, {"kv_compaction": "off"}) for i in range(8)]


def next_ask(rng: random.Random, prefixes: Sequence[tuple[int, ...]], compacting: bool) -> Ask:
    """What another client asks; of stock vLLM without options that are none there."""
    shared = rng.choice(prefixes)[: rng.choice([0, 0, 200, 700, 1200])]
    own = tokens(rng, rng.choice([5, 40, 300, LONGEST - len(shared) - 60]))
    wrong = rng.random() < WRONG
    options = rng.choice(NONSENSE if wrong else RIGHT) if compacting else {}
    hangs_up = not wrong and rng.random() < ABORTED
    return Ask(
        shared + own,
        rng.randrange(1, 60),
        options,
        stream=rng.random() < 0.5,
        given_up_after=rng.uniform(0.05, 3.0) if hangs_up else None,
    )


#: The bystanders, with what stock vLLM answers.
Known = list[tuple[Ask, list[int]]]


@dataclass
class Life:
    """What was seen of one server."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)
    """Bytes by kind of process, every few seconds."""
    answered: list[int] = field(default_factory=list)
    """Requests that had been answered at each of these times."""

    def fault(self, what: str) -> None:
        self.counts["faults"] += 1
        if len(self.faults) < 20:
            self.faults.append(what)


async def send(client: httpx.AsyncClient, ask: Ask) -> tuple[int, list[int]]:
    """Status and token ids of the answer.

    Raises:
        ValueError: a stream that is not one.
    """
    if not ask.stream:
        reply = await client.post("/v1/completions", json=ask.body())
        if reply.status_code != 200:
            return reply.status_code, []
        return 200, list(reply.json()["choices"][0]["token_ids"])
    ids: list[int] = []
    async with client.stream("POST", "/v1/completions", json=ask.body()) as reply:
        if reply.status_code != 200:
            await reply.aread()
            return reply.status_code, []
        last = ""
        async for line in reply.aiter_lines():
            if not line:
                continue
            last = line
            if line.startswith("data: {"):
                event = httpx.Response(200, content=line.removeprefix("data: ")).json()
                if "error" in event:
                    raise ValueError(f"an error behind 200 OK: {event['error']}")
                ids += event["choices"][0]["token_ids"] if event["choices"] else []
    if last != "data: [DONE]":
        raise ValueError(f"a stream that ends with {last[:100]!r}")
    return 200, ids


async def one(client: httpx.AsyncClient, ask: Ask, expected: list[int] | None, life: Life) -> None:
    """Send a request and judge the answer; ``expected`` where it is known."""
    try:
        if ask.given_up_after is not None:
            try:
                await asyncio.wait_for(send(client, ask), ask.given_up_after)
            except TimeoutError:
                life.counts["given up"] += 1
            return
        status, ids = await send(client, ask)
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        life.fault(f"{ask.options} stream={ask.stream}: {error!r}")
        return
    wrong = ask.options in NONSENSE
    if status != (400 if wrong else 200):
        life.fault(f"HTTP {status} for {ask.options} stream={ask.stream}")
    elif wrong:
        life.counts["refused"] += 1
    elif len(ids) != ask.max_tokens:
        life.fault(f"{len(ids)} of {ask.max_tokens} tokens for {ask.options}")
    else:
        life.counts["answered"] += 1
        life.counts["tokens"] += len(ids)
        if expected is not None:
            life.counts["bystanders"] += 1
            if ids != expected:
                life.fault("a bystander's answer is not stock vLLM's")


async def load(
    port: int, seconds: float, seed: int, life: Life, known: Known, compacting: bool
) -> None:
    """All clients, for so long."""
    rng = random.Random(seed)
    prefixes = [tokens(rng, 1300) for _ in range(3)]
    until = time.monotonic() + seconds

    async def client_of(number: int) -> None:
        own = random.Random(f"{seed} {number}")
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=300) as client:
            while time.monotonic() < until:
                if own.random() < BYSTANDERS:
                    await one(client, *own.choice(known), life)
                else:
                    await one(client, next_ask(own, prefixes, compacting), None, life)

    await asyncio.gather(*(client_of(number) for number in range(CLIENTS)))


def memory_of(server: Server) -> dict[str, int]:
    """Resident bytes of the engine's processes and of the others; shared pages count for each."""
    root = psutil.Process(server.pid)
    total = {ENGINE: 0, WORKER: 0, OTHERS: 0}
    for process in [root, *root.children(recursive=True)]:
        try:
            title = " ".join(process.cmdline())
            kind = ENGINE if "EngineCore" in title else WORKER if "Worker" in title else OTHERS
            total[kind] += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def stock_answers() -> Known:
    """What stock vLLM answers the bystanders, one after the other."""
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(str(MODEL), SERVER, Path(folder, "log"), ENVIRONMENT) as server,
    ):
        server.wait_until_ready()
        for ask in bystanders():
            body = Ask(ask.prompt, ask.max_tokens).body()
            url = f"http://{HOST}:{server.port}/v1/completions"
            reply = httpx.post(url, json=body, timeout=300).raise_for_status().json()
            found.append((ask, reply["choices"][0]["token_ids"]))
    return found


#: Gauges that must be back at zero when nobody asks any more.
AT_REST = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)
#: The same of a server that compacts; and how many times it did.
COMPACTIONS = "vllm:kv_compaction_compactions_total"
OF_COMPACTION_AT_REST = (
    "vllm:kv_compaction_sequences",
    "vllm:kv_compaction_fits_running",
    "vllm:kv_compaction_slots_held",
    "vllm:kv_compaction_blocks_held",
)


def growth_of(readings: Sequence[int]) -> float:
    """Bytes by which memory grows over some readings, by the medians of their halves.

    Single readings would not do: a fit that happens to run adds its temporaries.
    """
    middle = len(readings) // 2
    if not middle:
        return 0.0
    # The medians of the two halves are half of all apart.
    return 2 * (statistics.median(readings[middle:]) - statistics.median(readings[:middle]))


def last_half(life: Life) -> list[dict[str, int]]:
    return life.memory[len(life.memory) // 2 :]


def meanwhile(life: Life, other: Life) -> list[dict[str, int]]:
    """Readings of another server, between as many answers as this one gave in its last half."""
    first, last = life.answered[len(life.answered) // 2], life.answered[-1]
    readings = zip(other.answered, other.memory, strict=True)
    return [memory for answered, memory in readings if first <= answered <= last]


async def live(server: Server, seconds: float, seed: int, known: Known, compacting: bool) -> Life:
    """Load a server for so long, watching its memory."""
    life = Life()

    async def watch() -> None:
        with Progress(transient=True) as progress:
            bar = progress.add_task("soaking", total=seconds)
            started = time.monotonic()
            while True:
                life.memory.append(memory_of(server))
                life.answered.append(life.counts["answered"])
                progress.update(bar, completed=time.monotonic() - started)
                await asyncio.sleep(2)

    watcher = asyncio.create_task(watch())
    try:
        await load(server.port, seconds, seed, life, known, compacting)
    finally:
        watcher.cancel()
    return life


def settle(server: Server, life: Life, compacting: bool) -> None:
    """Nothing may be held when the clients are gone: one last request lets the engine report."""
    ask = Ask(tokens(random.Random(2), 10), 2)
    held: dict[str, float] = {}
    gauges = (*AT_REST, *(OF_COMPACTION_AT_REST if compacting else ()))
    for _ in range(20):
        url = f"http://{HOST}:{server.port}/v1/completions"
        httpx.post(url, json=ask.body(), timeout=60).raise_for_status()
        time.sleep(0.5)
        metrics = server.metrics()
        held = {name: metrics.total(name) for name in gauges if metrics.total(name)}
        if not held:
            return
    life.fault(f"still held: {held}")


def row_of(
    server: Server, life: Life, api_servers: int, seconds: float, compacting: bool, stock: Life
) -> Row:
    """The outcome, for the table.

    Args:
        stock: life of a server of stock vLLM under the same load; an empty one where none is known.
    """
    metrics = server.metrics()
    memory = [sum(reading.values()) for reading in life.memory]
    end = statistics.median(memory[3 * len(memory) // 4 :])
    growth = growth_of([sum(reading.values()) for reading in last_half(life)])
    of_stock = growth_of([sum(reading.values()) for reading in meanwhile(life, stock)])
    limit = max(GROWTH * end, NOISE << 20)
    if growth - of_stock > limit and seconds >= GROWN_UP and compacting:
        life.fault(
            f"memory grew by {growth / end:.1%} over the last half, and by "
            f"{(growth - of_stock) / end:.1%} more than that of stock vLLM"
        )
    for line in server.log_lines("ERROR")[:5]:
        life.fault(f"log: {line[:200]}")
    return {
        "server": "compacting" if compacting else "stock",
        "API servers": api_servers,
        "seconds": seconds,
        **{
            name: life.counts[name]
            for name in ("answered", "tokens", "bystanders", "refused", "given up")
        },
        "compactions": int(metrics.total(COMPACTIONS)) if compacting else 0,
        "preemptions": int(metrics.total("vllm:num_preemptions_total")),
        "memory, MiB": round(end / 2**20),
        "most, MiB": max(memory) >> 20,
        "grown, MiB": round(growth / 2**20),
        **{
            f"of it {kind}": round(growth_of([each[kind] for each in last_half(life)]) / 2**20)
            for kind in (ENGINE, WORKER, OTHERS)
        },
        "stock grew, MiB": round(of_stock / 2**20) if compacting and stock.memory else "",
        "faults": life.counts["faults"],
    }


def soak(
    api_servers: int, seconds: float, seed: int, known: Known, compacting: bool, stock: Life
) -> tuple[Row, Life]:
    """One server's life; ``stock``: that of stock vLLM."""
    flags = [*SERVER, *(COMPACTION if compacting else ())]
    if api_servers > 1:
        flags += ["--api-server-count", str(api_servers)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(str(MODEL), flags, Path(folder, "log"), ENVIRONMENT) as server,
    ):
        server.wait_until_ready()
        life = asyncio.run(live(server, seconds, seed, known, compacting))
        try:
            settle(server, life, compacting)
            return row_of(server, life, api_servers, seconds, compacting, stock), life
        except (httpx.HTTPError, ServerError):
            # What it said first, before the folder goes.
            typer.echo("\n".join(server.log_lines("ERROR")[:FIRST_LINES]), err=True)
            raise


def main(
    seconds: Annotated[float, typer.Option(help="How long each server lives.")] = 120,
    api_servers: Annotated[
        list[int] | None, typer.Option(help="Number of API servers; may be given again.")
    ] = None,
    stock: Annotated[
        bool, typer.Option(help="First the same load on stock vLLM, for its memory.")
    ] = False,
    seed: Annotated[int, typer.Option()] = 0,
    out: Folder = None,
    record: Record = False,
) -> None:
    """Soak a server, write ``soak.{csv,md}``; exit status 1 if anything went wrong."""
    folder, console = result_path(out, record), Console()
    known = stock_answers()
    rows, faults = [], []
    counts = api_servers or [1]
    lives: dict[int, Life] = {}
    for compacting, count in [*((False, n) for n in counts if stock), *((True, n) for n in counts)]:
        row, life = soak(count, seconds, seed, known, compacting, lives.get(count, Life()))
        if not compacting:
            lives[count] = life
        rows.append(row)
        faults += [f"{row['server']}, {count} API servers: {what}" for what in life.faults]
    notes = [
        f"{CLIENTS} clients at once; {BYSTANDERS:.0%} of their requests are bystanders (compaction "
        f"off, compared with stock vLLM token for token), of the others {WRONG:.0%} are wrong "
        f"(HTTP 400) and {ABORTED:.0%} given up; a pool of {BLOCKS - 1} blocks of {BLOCK} tokens.",
        "A fault is an answer that is not what was asked for, a gauge that is not back at zero, an "
        f"ERROR line in the log, or memory that grew by more than {GROWTH:.0%} and {NOISE} MiB "
        f"over the last half (of {GROWN_UP} seconds or more), beyond what stock vLLM's grew by.",
        "Resident memory of all processes, shared pages once for each: the median of the last "
        "quarter, the most at any time, and by how much the last half grew, by the medians of its "
        "own halves; `stock grew`: the server without compaction, between as many answers as the "
        "compacting one gave in its last half. oneDNN keeps 16 compiled kernels here, not 1,024: "
        "one for each shape that it meets, they would grow for longer than this lasts.",
        *faults,
    ]
    Report("soak", "A server's life under everything that clients do", rows, notes).write(folder)
    console.print((folder / "soak.md").read_text(), markup=False)
    console.print(written(folder, "soak.md", "soak.csv"), markup=False)
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
