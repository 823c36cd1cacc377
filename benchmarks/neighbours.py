"""What others notice of compactions: time to first token and between tokens, over real HTTP.

    python -m benchmarks.neighbours

Bystanders (short prompts, never compacted) and long requests arrive independently at random
(Poisson arrivals, the same ones in every row) at ``vllm serve``; all answers are streamed. Rows:
stock vLLM; ours with long requests left exact, per request; ours with long requests compacted. Long
requests have answers that end soon, or last. Rows ``exact`` and ``compacted`` are the same server,
one after the other.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from benchmarks.demo import BLOCK_SIZE, RECALL_MODEL
from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.recall.documents import DENSITIES, generate
from benchmarks.serving import HOST, Server, ServerError


@dataclass(frozen=True)
class Stream:
    """Requests of one kind."""

    per_second: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Load:
    """What arrives."""

    seconds: float
    bystanders: Stream
    long: dict[str, Stream]
    blocks: int


FULL = Load(
    seconds=30,
    bystanders=Stream(2.0, 60, 60),
    long={"3,000 tokens, answers of 8": Stream(1.0, 3000, 8), "of 1,000": Stream(0.25, 3000, 1000)},
    blocks=2000,
)
#: To try the code.
SMOKE = Load(3, Stream(2.0, 20, 6), {"900 tokens, answers of 8": Stream(2.0, 900, 8)}, 300)


@dataclass
class Answer:
    """When a request was sent, and when each of its tokens came."""

    sent: float
    tokens: list[float] = field(default_factory=list)


def columns(answers: Sequence[Answer], who: str, seconds: float) -> Row:
    """Of all requests of one kind: percentiles in milliseconds, and rates."""
    first = [a.tokens[0] - a.sent for a in answers]
    between = [gap for a in answers for gap in np.diff(a.tokens).tolist()]
    tokens = sum(len(a.tokens) for a in answers)
    row: Row = {f"{who}: requests": len(answers), f"{who}: tokens/s": tokens / seconds}
    for name, times in (("first token", first), ("between tokens", between)):
        for q in (50, 99):
            row[f"{who}: {name}, p{q} ms"] = 1000 * float(np.percentile(times, q))
    return row


def arrivals(stream: Stream, seconds: float, seed: int) -> list[float]:
    """Seconds at which requests arrive: Poisson."""
    generator, now, found = random.Random(seed), 0.0, []
    while (now := now + generator.expovariate(stream.per_second)) < seconds:
        found.append(now)
    return found


def prompt(tokens: int, name: str) -> str:
    """A text of the bundled model's language, for each name another one."""
    return generate(random.Random(f"neighbours {tokens} {name}"), tokens, DENSITIES["sparse"]).text


async def ask(
    client: httpx.AsyncClient, model: str, at: float, prompt: str, more: dict[str, Any]
) -> Answer:
    """Wait until a request is due, send it, note when each token comes."""
    await asyncio.sleep(max(0.0, at - time.perf_counter()))
    answer = Answer(time.perf_counter())
    body = {"model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json={**body, **more}) as response:
        if not response.is_success:
            raise ServerError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: ") and '"text"' in line:
                answer.tokens.append(time.perf_counter())
    return answer


async def run(
    server: Server, load: Load, long: Stream | None, options: dict[str, Any], run_number: int
) -> tuple[list[Answer], list[Answer], float]:
    """Bystanders, long requests, and the seconds until the last of them was answered."""
    async with httpx.AsyncClient(
        base_url=f"http://{HOST}:{server.port}",
        timeout=600,
        limits=httpx.Limits(max_connections=None),
    ) as client:
        start = time.perf_counter() + 0.1

        def all_of(stream: Stream, kind: int, xargs: dict[str, Any]) -> list[Any]:
            more = {"max_tokens": stream.output, **({"vllm_xargs": xargs} if xargs else {})}
            times = arrivals(stream, load.seconds, kind)
            prompts = [prompt(stream.prompt, f"{run_number} {i}") for i in range(len(times))]
            return [
                ask(client, server.model, start + at, p, more)
                for at, p in zip(times, prompts, strict=True)
            ]

        beside = all_of(load.bystanders, 1, {})
        those = all_of(long, 2, options) if long else []
        answers = await asyncio.gather(*beside, *those)
        seconds = time.perf_counter() - start
    return answers[: len(beside)], answers[len(beside) :], seconds


@contextmanager
def serving(load: Load, *flags: str) -> Iterator[Server]:
    """A server, ready and warm; its log is kept if something goes wrong."""
    log = Path(gettempdir()) / f"vllm-am-neighbours-{os.getpid()}.log"
    common = [
        *("--block-size", str(BLOCK_SIZE), "--max-model-len", "4096"),
        *("--num-gpu-blocks-override", str(load.blocks), "--dtype", "float32"),
        *("--enforce-eager", "--no-enable-prefix-caching"),
    ]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with Server(os.path.relpath(RECALL_MODEL), [*common, *flags], log, env) as server:
        server.wait_until_ready()
        long = next(iter(load.long.values()))
        warm = Load(2.0, load.bystanders, {}, load.blocks)
        asyncio.run(run(server, warm, Stream(1.0, long.prompt, 32), {}, run_number=99))
        yield server
    log.unlink()


def rows_of(load: Load, step_ms: Sequence[float | None]) -> Iterator[Row]:
    """Row by row."""
    with serving(load) as server:
        yield from measure(server, "stock", load, {})
    for bound in step_ms:
        config = [] if bound is None else ["--kv-compaction-config", f'{{"step_ms": {bound}}}']
        threshold = str(next(iter(load.long.values())).prompt // 2)
        flags = ["--kv-compaction", "attention-matching", "--kv-compaction-threshold", threshold]
        name = "ours" if bound is None else f"ours, step_ms {bound:g}"
        with serving(load, *flags, *config) as server:
            ways = {"exact": {"kv_compaction": "off"}, "compacted": {}}
            yield from measure(server, name, load, ways)


def measure(
    server: Server, name: str, load: Load, ways: dict[str, dict[str, str]]
) -> Iterator[Row]:
    """Rows of one server: bystanders alone, then beside long requests, treated each way in turn."""
    beside, _, seconds = asyncio.run(run(server, load, None, {}, run_number=0))
    yield {"server": name, "long requests": "none", **columns(beside, "bystanders", seconds)}
    for kind, stream in load.long.items():
        for way, options in (ways or {"exact": {}}).items():
            before = server.metrics()
            beside, long, seconds = asyncio.run(run(server, load, stream, options, run_number=10))
            row: Row = {"server": name, "long requests": f"{kind}, {way}"}
            row |= columns(beside, "bystanders", seconds) | columns(long, "long", seconds)
            if ways:
                made = server.metrics().since(before)
                row["compactions"] = int(made.total("vllm:kv_compaction_compactions_total"))
                step = "vllm:kv_compaction_step_seconds"
                row["ms added to a step with fits, mean"] = 1000 * made.mean(step)
            yield row


def main(
    out: Folder = None,
    record: Record = False,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, to try the code.")] = False,
    step_ms: Annotated[
        list[float] | None, typer.Option(help="Other bounds of a step, beside the default.")
    ] = None,
) -> None:
    """Measure, write ``neighbours.{csv,md}``."""
    folder, load = result_path(out, record), SMOKE if smoke else FULL
    notes = [
        f"Bystanders: {load.bystanders.per_second:g} per second, prompts of "
        f"{load.bystanders.prompt} tokens, answers of {load.bystanders.output}, for "
        f"{load.seconds:g} s; long requests: "
        + "; ".join(f"{s.per_second:g} per second ({kind})" for kind, s in load.long.items())
        + ". The bundled model at 10x, nothing shared or cached, a pool that holds all of them.",
    ]
    bounds = [None, *(step_ms or [])]
    title = "What neighbours notice of compactions"
    Report("neighbours", title, rows_of(load, bounds), notes).write(folder)
    typer.echo((folder / "neighbours.md").read_text())
    typer.echo(written(folder, "neighbours.md", "neighbours.csv"))


if __name__ == "__main__":
    typer.run(main)
