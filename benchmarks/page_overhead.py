"""Blocks that a compacted sequence holds: what the formula says, and what the real engine holds.

    python -m benchmarks.page_overhead
    python -m benchmarks.page_overhead --published NAME=BUDGETS.json

A span of T tokens at ratio r holds ``ceil(ceil(r T) / B)`` blocks of B tokens, however its pages
are divided among the heads: less than ``r T + B`` slots per head. It shrinks by more than
``1 / (1 + B / (r T))`` of what was asked for. Beside it a sequence holds the blocks of its
protected prefix and of its exact tail. The contrast is what the paper's code holds with the same
budgets: it pads every head of a layer to the longest one.

Every row is a request to the engine, vLLM's CPU build. Model and tokens are dummies, and evicting
(``recent``) stands in for the fit: which keys are kept, and how well, does not change their number.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cases import PAGE_OVERHEAD, Case, cases_of
from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.models import qwen3
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.plots import plot_lines
from tests.engine import driver
from vllm_am.config import BUDGETS

NOTES = (
    "![Share of the ratio asked for](page_overhead.png)",
    "*Span*: the tokens that were compacted, and the blocks that stand for them. *Formula*: "
    "`benchmarks/page_overhead.py`, from the numbers of tokens and the block size alone. *Padded*: "
    "what the same pages per head would take if every head of a layer held as many as the longest, "
    "as in the paper's code.",
    "*Sequence*: with what stays exact, which is the protected first block, the last 64 tokens up "
    "to a whole block, and what was generated. These few blocks weigh the more, the shorter the "
    "context and the higher the ratio: a whole sequence may stay well below 93 % of the ratio "
    "asked for where its span is above. Spans of few blocks do too, by rounding up: above 93 % is "
    "certain where a span keeps 13.3 B slots per head or more (213 with blocks of 16).",
    "*Budgets*: `skewed` is a formula with the properties of the budgets published for Qwen3-4B "
    "(`skewed_shares`), 8 layers x 4 KV heads; other names are published files, each in a model of "
    "its number of layers and KV heads. The weights are dummies: how `global` divides pages here "
    "is no statement about any model. Rounding up is to whole slots and whole blocks of a span, "
    "not per head, so that budgets do not show in the blocks held.",
    "Blocks of 16 are vLLM's default on a GPU; its CPU engine has blocks of 128 by default and "
    "multiples of 32 on request, and was told here to take 16.",
)

#: Head shares by name as in a budgets file, or ``uniform`` or ``global``.
Budgets = str | dict[str, float]

#: vLLM's default on a GPU, the least that its CPU kernel takes, and its default on a CPU.
BLOCK_SIZES: tuple[int, ...] = (16, 32, 128)

#: Prompts that are longer are compacted. OUTPUT_TOKENS: enough steps for that to take effect.
THRESHOLD, OUTPUT_TOKENS = 2048, 8

#: The least share of a head in the skewed budgets, in units of the mean share.
FLOOR = 0.136
#: What the quarters of the depth get together, the two layers of a quarter, and in a layer its
#: heads of what is above their floors.
QUARTERS, LAYERS, HEADS = (0.11, 0.30, 0.40, 0.19), (0.81, 0.19), (10 / 11, 1 / 11, 0.0, 0.0)


# -- the formula ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What a compacted sequence holds.

    Attributes:
        spans: tokens of each compacted span.
        span_blocks: blocks of all of them together.
        exact_blocks: of the protected prefix and of what comes after the last span.
    """

    spans: tuple[int, ...]
    span_blocks: int
    exact_blocks: int

    @property
    def blocks(self) -> int:
        return self.span_blocks + self.exact_blocks


def span_blocks(tokens: int, ratio: float, block_size: int) -> int:
    """``ceil(ceil(r T) / B)``, exact for the decimal number that ``ratio`` stands for."""
    slots = ceil(Fraction(ratio).limit_denominator(10**6) * tokens)
    return ceil(Fraction(slots, block_size))


def layout(
    prompt: int,
    computed: int,
    ratio: float,
    block_size: int,
    *,
    threshold: int = 4096,
    protected_tokens: int = 4,
    recent_tokens: int = 64,
    max_span_tokens: int = 16384,
) -> Layout:
    """The formula for a whole sequence, compacted behind its prefill as far as its options say.

    Args:
        prompt: tokens of the prompt; computed: tokens so far, few enough behind the prompt that
            none of them was due to be compacted.
        ratio: share of a span's tokens that is kept.
        block_size: tokens per block.
        threshold, protected_tokens, recent_tokens, max_span_tokens: the engine's options.
    """
    start = protected = ceil(Fraction(protected_tokens, block_size)) * block_size
    last = (prompt - recent_tokens) // block_size * block_size
    spans: list[int] = []
    while prompt - start + protected > threshold:
        spans.append(min(last - start, max_span_tokens // block_size * block_size))
        start += spans[-1]
    exact = protected // block_size + ceil(Fraction(computed - start, block_size))
    return Layout(tuple(spans), sum(span_blocks(n, ratio, block_size) for n in spans), exact)


# -- budgets --------------------------------------------------------------------------------------


def skewed_shares() -> dict[str, float]:
    """A budgets file for 8 layers x 4 KV heads, as uneven as the one published for Qwen3-4B.

    Taken from there: the shares of the quarters, the floor, that half of the heads are on it (155
    of 288 there), and that every other layer and in each layer one head hold most of the rest. In
    units of the mean share, the largest comes to 9.1 (9.1 there), and the largest of a layer, on
    average over the layers, to 3.3 (3.5 there).
    """
    heads = len(QUARTERS) * len(LAYERS) * len(HEADS)
    shares = {}
    for layer, (quarter, part) in enumerate(product(QUARTERS, LAYERS)):
        above_floors = quarter * part - len(HEADS) * FLOOR / heads
        for head, top in enumerate(HEADS):
            shares[f"L{layer}H{head}"] = FLOOR / heads + above_floors * top
    return shares


def shape_of(shares: Mapping[str, float]) -> tuple[int, int]:
    """Layers and KV heads of the model that a budgets file is made for."""
    places = [tuple(map(int, re.findall(r"\d+", name))) for name in shares]
    return 1 + max(layer for layer, _ in places), 1 + max(head for _, head in places)


def read_published(path: Path) -> dict[str, float]:
    """A budgets file whose layers are numbered without those that have no share (sliding ones)."""
    shares = {
        tuple(map(int, re.findall(r"\d+", name))): share
        for name, share in json.loads(path.read_text()).items()
    }
    layers = sorted({layer for layer, _ in shares})
    return {f"L{layers.index(layer)}H{head}": share for (layer, head), share in shares.items()}


# -- the engine -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What the engine held for a sequence at one of its steps.

    Attributes:
        computed: tokens so far.
        blocks: of the sequence, exact and compacted.
        spans: tokens of each compacted span.
        span_blocks: blocks of all compacted spans.
        pages: of each head of each layer, [layers][KV heads].
    """

    computed: int
    blocks: int
    spans: tuple[int, ...]
    span_blocks: int
    pages: tuple[tuple[int, ...], ...]

    @property
    def padded_blocks(self) -> float:
        """Blocks of the spans if the heads of a layer all held as many pages as the longest."""
        return sum(map(max, self.pages)) / len(self.pages)


def look(engine: driver.Engine) -> Held:
    """What is held for the one sequence of the engine, between two of its steps."""
    manager, state = engine.scheduler.compaction.blocks, engine.worker._compaction
    ((name, request),) = engine.scheduler.requests.items()
    segments = manager.segments(name)
    sequence = state.sequences.get(name)
    pages = [len(ids) for ids in sequence.lists] if sequence else []
    heads = state.kv.num_kv_heads
    return Held(
        computed=request.num_computed_tokens,
        blocks=manager.held_blocks(name),
        spans=tuple(segment.end - segment.start for segment in segments),
        span_blocks=sum(len(segment.block_ids) for segment in segments),
        pages=tuple(tuple(pages[at : at + heads]) for at in range(0, len(pages), heads)),
    )


def serve(engine: driver.Engine, tokens: int, ratio: float) -> tuple[Held, Held]:
    """A prompt of so many tokens: what is held for it before its first compaction, and at its end.

    Prompts begin alike: with prefix caching, each token is computed once.

    Raises:
        RuntimeError: it was not compacted.
    """
    seen: list[Held] = []
    engine.before_step = lambda engine, step: seen.append(look(engine))
    prompt = driver.random_prompt(random.Random(0), tokens)
    ask = driver.Ask(prompt, OUTPUT_TOKENS, {"kv_compaction_ratio": ratio})
    engine.run([ask], names=f"{tokens} tokens at {ratio}, ")
    if not seen[-1].spans:
        raise RuntimeError(f"{tokens} tokens at {ratio}: nothing was compacted")
    return [held for held in seen if not held.spans][-1], seen[-1]


@contextmanager
def start(cases: Sequence[Case], budgets: Budgets, block_size: int) -> Iterator[driver.Engine]:
    """An engine for these cases, all of one shape."""
    shape, longest = cases[0], max(case.tokens for case in cases) + OUTPUT_TOKENS
    model = qwen3(
        layers=shape.layers,
        hidden=32,
        intermediate=32,
        heads=shape.kv_heads * shape.group_size,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocabulary=512,
        positions=longest,
        dtype="float32",
    )
    options = {
        "budgets": budgets,
        "method": "recent",
        "threshold": THRESHOLD,
        "reference_queries": shape.queries,
        # All of a fit in the step in which it is due.
        "step_ms": 1e6,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model))
        with driver.start(
            Path(folder),
            options,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=longest,
            block_size=block_size,
            # The longest sequence, and beside it what it is compacted to.
            num_gpu_blocks_override=5 * longest // (4 * block_size) + 2,
        ) as engine:
            yield engine


# -- the table ------------------------------------------------------------------------------------


def rows_of(cases: Sequence[Case], name: str, budgets: Budgets, block_size: int) -> list[Row]:
    """Rows of one engine: every case at every ratio."""
    rows = []
    with start(cases, budgets, block_size) as engine:
        for case in cases:
            for ratio in case.ratios:
                before, after = serve(engine, case.tokens, ratio)
                rows.append(row_of(case.tokens, name, block_size, ratio, before, after))
    return rows


def row_of(tokens: int, name: str, block_size: int, ratio: float, before: Held, after: Held) -> Row:
    """What was held against what was asked for and what the formula says."""
    formula = layout(tokens, after.computed, ratio, block_size, threshold=THRESHOLD)
    span = sum(after.spans)
    real = span / (after.span_blocks * block_size)
    return {
        "budgets": name,
        "block size": block_size,
        "tokens": tokens,
        "asked for": 1 / ratio,
        "span": span,
        "span, blocks before": span // block_size,
        "span, blocks after": after.span_blocks,
        "span, formula": formula.span_blocks,
        "span, smaller by": real,
        "of what was asked for": real * ratio,
        "padded, blocks after": after.padded_blocks,
        "padded, smaller by": span / (after.padded_blocks * block_size),
        "sequence, blocks before": before.blocks,
        "sequence, blocks after": after.blocks,
        "sequence, formula": formula.blocks,
        "sequence, smaller by": before.blocks / after.blocks,
    }


def report(published: Mapping[str, Path], smoke: bool) -> Report:
    """The table, with its notes.

    Args:
        published: budgets files by name, each measured on a model of its shape.
    """
    cases, block_sizes = cases_of(PAGE_OVERHEAD), BLOCK_SIZES
    if smoke:
        cases, block_sizes = (replace(cases[0], tokens=THRESHOLD + 300),), BLOCK_SIZES[1:2]
    skewed: dict[str, Budgets] = {"skewed": skewed_shares()}
    rows = []
    for block_size in block_sizes:
        others = {"global": "global", "uniform": "uniform"} if block_size == 16 else {}
        for name, budgets in (skewed | others).items():
            rows += rows_of(cases, name, budgets, block_size)
    for name, path in published.items():
        shares = read_published(path)
        layers, kv_heads = shape_of(shares)
        shaped = [replace(case, layers=layers, kv_heads=kv_heads) for case in cases]
        rows += rows_of(shaped, name, shares, block_sizes[0])
    return Report("page_overhead", "Blocks held by compacted sequences", rows, NOTES)


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """What a span really shrinks by, of what was asked for, against the context."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    highest = max(row["asked for"] for row in rows)
    for row in rows:
        name, asked, size = row["budgets"], row["asked for"], row["block size"]
        least = size == min(BLOCK_SIZES)
        if name == "skewed" and (least or asked == highest):  # others hold as many blocks
            point = (row["tokens"], row["of what was asked for"])
            lines[f"{asked:g}x, blocks of {size}"].append(point)
        if name not in BUDGETS and least and asked == highest:
            point = (row["tokens"], row["padded, smaller by"] / asked)
            lines[f"{asked:g}x, padded: {name}"].append(point)
    plot_lines(
        path,
        "Compacted span: smaller by, of what was asked for",
        lines,
        x="tokens of the context",
        y="share of the ratio asked for",
    )


def main(
    published: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: a budgets file to measure as well.")
    ] = None,
    out: Folder = None,
    record: Record = False,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, to try the code.")] = False,
) -> None:
    """Measure, write ``page_overhead.{csv,md,png}``."""
    folder = result_path(out, record)
    files = {}
    for argument in published or []:
        name, equals, path = argument.partition("=")
        if not equals or not Path(path).is_file():
            raise typer.BadParameter(f"--published={argument!r}: expected NAME=FILE")
        files[name] = Path(path)
    rows = report(files, smoke).write(folder)
    plot(folder / "page_overhead.png", rows)
    typer.echo((folder / "page_overhead.md").read_text())
    typer.echo(written(folder, "page_overhead.md", "page_overhead.csv", "page_overhead.png"))


if __name__ == "__main__":
    typer.run(main)
