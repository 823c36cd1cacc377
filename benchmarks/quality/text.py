"""What a real model still knows of a real text after compaction, in the real engine.

    python -m benchmarks.quality text --ratios 10x,20x

Of each text a document of some 2,000 tokens is read, into which facts are planted: numbers, names,
dates, one told twice, one told anew with another value. It is compacted, and then forced on the
model: how the text goes on, passages of it from a cue of a few words, the planted facts. A token
counts as known where it was the most likely one. The full cache does not know everything either,
so shares are of what it knows.

Texts that defaults are chosen on ("tuned") and texts that are only reported ("validation") stand in
rows of their own.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.quality import engine_backend
from benchmarks.quality.conversations import Conversation, Mode, SuffixScore, Target
from benchmarks.real_models.catalogue import MODELS, TEXTS, find_model, find_text
from benchmarks.real_models.packages import Unavailable
from vllm_am.config import CompactionConfigError, parse_ratio

CONTINUATION, PASSAGE, FACT = "continuation", "passages", "facts"
#: Tokens that are forced of each.
CONTINUATION_TOKENS, CUE_TOKENS, PASSAGE_TOKENS = 96, 14, 40
#: Where passages begin, in shares of the document.
PASSAGES = (0.15, 0.45, 0.75)
#: Room for all documents at once, and for the queries of all.
KV_GIB = 4
#: Draws of documents for the confidence intervals.
BOOTSTRAP = 2000

_NAMES = (
    "Marlow",
    "Ashby",
    "Quill",
    "Thorne",
    "Pellam",
    "Wren",
    "Corvin",
    "Hale",
    "Isolde",
    "Tamsin",
)
_PLACES = ("Brackwater", "Eldermoor", "Kestrel Bay", "Norwick", "Saltmarsh", "Varnhold", "Greyfen")
_MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")

#: Configurations by name: what goes into ``--kv-compaction-config``.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "global": {"budgets": "global"},
    "not shared": {"cache": "off"},
    "omp-fast": {"method": "omp-fast"},
    "paper": {"budgets": "uniform", "queries": "repeat-prefill"},
    "evict-max, repeat": {"method": "evict-max", "queries": "repeat-prefill"},
    "evict-max": {"method": "evict-max"},
    "recent": {"method": "recent", "budgets": "uniform"},
}


@dataclass(frozen=True)
class Fact:
    """What is planted, and how it is asked for.

    Attributes:
        sentences: in the document, in this order.
        question: what is forced before the value.
        value: what counts.
    """

    sentences: tuple[str, ...]
    question: str
    value: str


def make_facts(rng: random.Random) -> list[Fact]:
    """Eight facts: three numbers, two names, a date, a number told twice, one that was changed."""
    names, places = rng.sample(_NAMES, 8), rng.sample(_PLACES, 3)

    def number() -> str:
        return str(rng.randrange(10_000, 100_000))

    facts = []
    for name in names[:3]:
        told, value = f"The special number for {name} is", number()
        facts.append(Fact((f"{told} {value}.",), told, f" {value}"))
    for name, place in zip(names[3:5], places, strict=False):
        told = f"The keeper of the lighthouse at {place} is called"
        facts.append(Fact((f"{told} {name}.",), told, f" {name}"))
    day = f"{rng.randrange(1, 29)} {rng.choice(_MONTHS)} {rng.randrange(1500, 1990)}"
    told = f"The bridge at {places[2]} was opened on"
    facts.append(Fact((f"{told} {day}.",), told, f" {day}"))
    told, value = f"The code of the safe of {names[5]} is", number()
    again = f"Once more, the code of the safe of {names[5]} is {value}."
    facts.append(Fact((f"{told} {value}.", again), told, f" {value}"))
    told, old, new = f"The room number of {names[6]} is", number(), number()
    changed = f"The room was changed: now the room number of {names[6]} is {new}."
    facts.append(
        Fact((f"{told} {old}.", changed), f"Now the room number of {names[6]} is", f" {new}")
    )
    return facts


def make_document(tokenizer: Any, text: str, seed: int, tokens: int) -> Conversation:
    """A document of a text with planted facts, and what is asked of it.

    Args:
        tokenizer: of the model; a Hugging Face one.
        text: long enough for the document and its continuation.
        seed: of the facts and of where they are put.
        tokens: of the document.
    """
    rng = random.Random(f"text-{seed}-{tokens}")
    facts = make_facts(rng)

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer.encode(part, add_special_tokens=False)
        return ids

    planted = [encode(f"\n{s}\n") for fact in facts for s in fact.sentences]
    body = tokens - sum(map(len, planted))
    ids = encode(text[: 12 * (tokens + CONTINUATION_TOKENS)])
    if len(ids) < body + CONTINUATION_TOKENS:
        raise ValueError(f"the text has {len(ids)} tokens, {body + CONTINUATION_TOKENS} are needed")
    # In the order of the sentences, so that a correction comes after what it corrects.
    places = sorted(rng.sample(range(body // 40, body - body // 10), len(planted)))
    prompt: list[int] = []
    last = 0
    for place, sentence in zip(places, planted, strict=True):
        prompt += ids[last:place] + sentence
        last = place
    prompt += ids[last:body]
    suffix = ids[body : body + CONTINUATION_TOKENS]
    every = range(len(suffix))
    targets = [Target(CONTINUATION, every, every)]
    for share in PASSAGES:
        begin = int(share * len(prompt))
        cue = encode("\n\n") + prompt[begin : begin + CUE_TOKENS]
        passage = prompt[begin + CUE_TOKENS : begin + CUE_TOKENS + PASSAGE_TOKENS]
        _ask(suffix, targets, PASSAGE, cue, passage)
    for fact in rng.sample(facts, len(facts)):
        asked, whole = encode(f"\n{fact.question}"), encode(f"\n{fact.question}{fact.value}")
        _ask(suffix, targets, FACT, asked, whole[len(asked) :])
    return Conversation(tuple(prompt), tuple(suffix), tuple(targets))


def _ask(
    suffix: list[int], targets: list[Target], kind: str, cue: Sequence[int], answer: Sequence[int]
) -> None:
    suffix += cue
    span = range(len(suffix), len(suffix) + len(answer))
    suffix += answer
    targets.append(Target(kind, span, span))


@dataclass(frozen=True)
class Known:
    """Of one document: what was the most likely token, and how likely the text was.

    Attributes:
        tokens: by kind.
        facts: whole ones.
        nll: of the continuation, per token in nats.
    """

    tokens: Mapping[str, int]
    facts: int
    nll: float


def known(conversation: Conversation, score: SuffixScore) -> Known:
    """What a forced pass shows."""
    tokens = dict.fromkeys((CONTINUATION, PASSAGE, FACT), 0)
    facts, nll = 0, math.nan
    for target in conversation.targets:
        right = [score.most_likely[i] for i in target.value]
        tokens[target.kind] += sum(right)
        if target.kind == FACT:
            facts += all(right)
        elif target.kind == CONTINUATION:
            nll = -sum(score.log_probs[i] for i in target.answer) / len(target.answer)
    return Known(tokens, facts, nll)


def share(found: Sequence[float], full: Sequence[float]) -> tuple[float, float]:
    """Ratio of two sums over documents, and half of its 95 % confidence interval (bootstrap)."""
    if not sum(full):
        return math.nan, math.nan
    pairs = np.array([found, full], dtype=float)
    drawn = np.random.default_rng(0).integers(0, len(found), (BOOTSTRAP, len(found)))
    sums = pairs[:, drawn].sum(axis=2)
    sums = sums[:, sums[1] > 0]
    low, high = np.percentile(sums[0] / sums[1], [2.5, 97.5])
    return float(pairs[0].sum() / pairs[1].sum()), float(high - low) / 2


def measure(
    model: Path,
    configurations: Mapping[str, Mapping[str, Any]],
    ratios: Sequence[float],
    texts: Sequence[str],
    seeds: int,
    tokens: int,
) -> Iterator[Row]:
    """A row for the full cache, then by configuration, ratio and group of texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    names = [name for name in texts for _ in range(seeds)]
    documents = []
    for number, name in enumerate(names):
        text, place = find_text(name), number % seeds
        documents.append(make_document(tokenizer, text[place * 12 * tokens :], number, tokens))
    groups = {
        "tuned": [i for i, name in enumerate(names) if TEXTS[name].tuned],
        "validation": [i for i, name in enumerate(names) if not TEXTS[name].tuned],
    }
    full: list[Known] = []
    for label, options in configurations.items():
        wanted: list[float | None] = list(ratios) if full else [None, *ratios]
        common = {"query_pool_share": 0.5}
        results = engine_backend.run(
            model, {**common, **options}, wanted, documents, Mode.AFTER, kv_gib=KV_GIB
        )
        for ratio, result in zip(wanted, results, strict=True):
            found = [known(d, s) for d, s in zip(documents, result.scores, strict=True)]
            if ratio is None:
                full = found
            for group, indices in groups.items():
                if indices:
                    yield {
                        "texts": group,
                        "configuration": "full cache" if ratio is None else label,
                        "ratio": 1.0 if ratio is None else ratio,
                        **_columns([found[i] for i in indices], [full[i] for i in indices]),
                        "blocks": sum(result.held[i] for i in indices) / len(indices),
                        "fit s": result.seconds,
                        "failures": sum(result.failures.values()),
                    }


def _columns(found: Sequence[Known], full: Sequence[Known]) -> Row:
    row: Row = {}
    for kind in (PASSAGE, FACT, CONTINUATION):
        mean, half = share([k.tokens[kind] for k in found], [k.tokens[kind] for k in full])
        row[f"{kind}, tokens"], row[f"± {kind}"] = mean, half
    row["whole facts"], row["± whole"] = share([k.facts for k in found], [k.facts for k in full])
    row["of facts"] = sum(k.facts for k in full)
    row["nll"] = sum(k.nll for k in found) / len(found)
    return row


def main(
    model: Annotated[str, typer.Option(help="A name of the catalogue, or a folder.")] = (
        "smollm2-135m"
    ),
    ratios: Annotated[str, typer.Option(help="Compaction ratios; 5x keeps 0.2.")] = "10x,20x,50x",
    texts: Annotated[str, typer.Option(help="Names of the catalogue; default: all.")] = "",
    configurations: Annotated[
        str, typer.Option(help="Names, or a JSON object of options by name; default: all.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Documents of each text.")] = 1,
    tokens: Annotated[int, typer.Option(min=600, help="Tokens of a document.")] = 2048,
    out: Folder = None,
    record: Record = False,
) -> None:
    """Passages and planted facts of real texts, with a real model in the real engine."""
    folder = result_path(out, record)
    chosen = _configurations(configurations)
    names = [name.strip() for name in texts.split(",") if name.strip()] or list(TEXTS)
    if unknown := sorted(set(names) - set(TEXTS)):
        raise typer.BadParameter(f"--texts: {unknown[0]!r}: expected {', '.join(TEXTS)}")
    try:
        kept = [parse_ratio(part, "--ratios") for part in ratios.split(",")]
    except CompactionConfigError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        path = find_model(model) if model in MODELS else Path(model)
        for name in names:
            find_text(name)
    except Unavailable as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    notes = [
        "Tokens of passages, facts and continuation, and whole facts: those that were most likely "
        "ones, as shares of what the full cache knows, ± half of the 95 % interval over documents "
        "(bootstrap). `nll`: of the continuation, nats per token. Blocks of 32 tokens.",
    ]
    rows = measure(path, chosen, kept, names, seeds, tokens)
    Report("quality-text", "Real texts", rows, notes).write(folder)
    typer.echo((folder / "quality-text.md").read_text())
    typer.echo(written(folder, "quality-text.md", "quality-text.csv"))


def _configurations(text: str) -> dict[str, dict[str, Any]]:
    if text.strip().startswith("{"):
        named: dict[str, dict[str, Any]] = json.loads(text)
        return named
    names = [name.strip() for name in text.split(";") if name.strip()] or list(CONFIGURATIONS)
    if unknown := sorted(set(names) - set(CONFIGURATIONS)):
        known_ones = "; ".join(CONFIGURATIONS)
        raise typer.BadParameter(f"--configurations: {unknown[0]!r}: expected {known_ones}")
    return {name: CONFIGURATIONS[name] for name in names}
