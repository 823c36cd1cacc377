"""Compacted in many rounds, or once: does quality drift? (bug museum, row 19)

A held-out document is written token by token into a sequence that is compacted as it grows: a few
blocks at a time become a segment of one, and segments that outgrow ``merge_slots`` are merged. Then
the same document is read at once and compacted once, to as many blocks as its rounds ended with.
Both are asked the same questions by the real engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from benchmarks.cases import find_case
from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.plots import plot_lines
from benchmarks.quality import engine_backend
from benchmarks.quality.conversations import (
    KINDS,
    Conversation,
    Mode,
    grade,
    make_conversations,
)
from benchmarks.quality.engine_backend import BLOCK_SIZE, MARGIN, Result
from benchmarks.quality.recall import Questions
from benchmarks.recall.recipe import BUNDLED

CASE = find_case("recall-rounds")
FULL, ONCE, ROUNDS = "never", "once", "rounds of"
#: Blocks that become a segment: some ten merges, and as many as there can be.
SEGMENTS_OF: tuple[int, ...] = (4, 2)

#: As many exact tokens behind the compacted part in both, and room for all documents' queries.
COMMON = {"recent_tokens": BLOCK_SIZE, "query_pool_share": 0.125, "step_ms": 1e6}
#: Tokens that are read before the sequence grows.
PREFILLED = 2 * BLOCK_SIZE


def growing(blocks: int) -> dict[str, float]:
    """Options with which so many blocks at a time become a segment of one.

    The threshold counts the protected and the recent block as well.
    """
    return {"threshold": (2 + blocks) * BLOCK_SIZE, "ratio": 1 / blocks}


def merge_slots(ratio: float, tokens: int) -> int:
    """The limit with which ``ratio`` of a document of so many tokens is held at its end."""
    return max(1, round(ratio * tokens / BLOCK_SIZE)) * BLOCK_SIZE


def single_ratio(prompt_tokens: int, held: int) -> float:
    """The ratio at which one compaction of a prompt leaves ``held`` blocks."""
    span = (prompt_tokens - MARGIN - BLOCK_SIZE) // BLOCK_SIZE - 1
    exact = math.ceil(prompt_tokens / BLOCK_SIZE) - span
    return (held - exact - 0.5) / span


def measure(
    conversations: Sequence[Conversation],
    ratios: Sequence[float],
    tokens: int,
    segments_of: Sequence[int],
) -> list[Row]:
    """A row for the full cache, and two for every ratio and kind of rounds.

    Raises:
        RuntimeError: a fit failed, or the two did not end with the same memory.
    """
    cases = list(itertools.product(ratios, segments_of))
    in_rounds = [
        engine_backend.run(
            BUNDLED.model,
            {**COMMON, **growing(blocks), "merge_slots": merge_slots(ratio, tokens)},
            [growing(blocks)["ratio"]],
            conversations,
            Mode.AFTER,
            prefilled=PREFILLED,
        )[0]
        for ratio, blocks in cases
    ]
    as_small = [
        [
            single_ratio(len(conversation.prompt), held)
            for conversation, held in zip(conversations, result.held, strict=True)
        ]
        for result in in_rounds
    ]
    never, *at_once = engine_backend.run(
        BUNDLED.model, COMMON, [None, *as_small], conversations, Mode.AFTER
    )
    rows = [_row(FULL, 1.0, conversations, never)]
    for (ratio, blocks), once, rounds in zip(cases, at_once, in_rounds, strict=True):
        if once.failures or rounds.failures or once.held != rounds.held:
            raise RuntimeError(f"fits failed, or memory differs: {once}, {rounds}")
        name = f"{ROUNDS} {blocks} blocks"
        rows += [_row(ONCE, ratio, conversations, once), _row(name, ratio, conversations, rounds)]
        rows[-1]["points"] = float(rows[-1]["right, %"]) - float(rows[-2]["right, %"])  # type: ignore[arg-type]
    return rows


def _row(name: str, ratio: float, conversations: Sequence[Conversation], result: Result) -> Row:
    found = grade(conversations, result.scores)
    right = sum(count.right for count in found.counts.values())
    return {
        "compacted": name,
        "about": f"{1 / ratio:g}x",
        "segments": result.compactions / len(conversations),
        "merges": result.merges / len(conversations),
        "blocks": result.blocks,
        "smaller": result.full_blocks / result.blocks,
        "right, %": 100 * right / sum(count.asked for count in found.counts.values()),
        **{f"{kind}, %": 100 * found.counts[kind].share for kind in KINDS},
        "nll": found.nll,
        "points": "",
    }


def main(
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents.")] = 6,
    tokens: Annotated[int, typer.Option(min=500, help="Of each, about.")] = CASE.tokens,
    asked: Annotated[
        str, typer.Option(help="Questions per document: recall/restated/tally.")
    ] = "14/6/3",
    quick: Annotated[bool, typer.Option(help="1 short document, 1 size: does it run?")] = False,
    output: Folder = None,
    record: Record = False,
) -> None:
    """One compaction against many rounds to the same memory, in the engine."""
    folder = result_path(output, record)
    ratios, segments_of = CASE.ratios, SEGMENTS_OF
    if quick:
        documents, tokens, ratios, segments_of = 1, min(tokens, 700), ratios[:1], segments_of[-1:]
    questions = asdict(Questions.parse(asked))
    conversations = [
        conversation
        for seed in range(documents)
        for conversation in make_conversations(seed, tokens, "sparse", Mode.AFTER, **questions)
    ]
    rows = measure(conversations, ratios, tokens, segments_of)
    notes = [
        f"{documents} sparse held-out documents of about {tokens:,} tokens, "
        f"{sum(len(c.targets) for c in conversations)} questions, blocks of {BLOCK_SIZE}; defaults "
        f"but `{COMMON}`, in rounds also `merge_slots` "
        f"{', '.join(str(merge_slots(ratio, tokens)) for ratio in ratios)} and, by blocks that "
        f"become one, {', '.join(f'`{growing(blocks)}`' for blocks in segments_of)}.",
        "*segments*, *merges*, *blocks*: of a document; *smaller*: its whole sequence, the exact "
        "parts included; *points*: right answers more than of one compaction to the same blocks.",
        "![Right answers and memory](quality-rounds.png)",
    ]
    Report("quality-rounds", "Many rounds of compaction against one", rows, notes).write(folder)
    plot_lines(
        folder / "quality-rounds.png",
        "Compacted in rounds, or once to the same memory",
        {
            name: [
                (float(row["smaller"]), float(row["right, %"]))  # type: ignore[arg-type]
                for row in rows
                if row["compacted"] in (FULL, name)
            ]
            for name in dict.fromkeys(str(row["compacted"]) for row in rows[1:])
        },
        x="sequence smaller by",
        y="right answers, %",
    )
    typer.echo((folder / "quality-rounds.md").read_text())
    typer.echo(written(folder, "quality-rounds.md", "quality-rounds.csv", "quality-rounds.png"))
