"""Accuracy of the exported model on held-out documents, with the full cache and with evicted keys.

Answers are checked by teacher forcing: a value counts when each of its tokens is the most likely
one, an answer when all of its tokens are, which is when greedy decoding would write it. Several
questions are asked in turn after one document.

The eviction proxy keeps, in every layer and for every key/value head alike, the keys of the prompt
that its own queries attend to most (root mean square), without any correction of what is lost. The
first and the last prompt tokens stay; what follows the prompt is never evicted.
"""

import argparse
import csv
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.folders import BENCHMARKS, result_path, written
from benchmarks.recall.documents import Document, Question, Role, chat_words, make_document
from benchmarks.recall.model import RecallModel, load, rope_tables
from benchmarks.recall.recipe import BUNDLED, RECIPES

LENGTHS = (1000, 2000, 3000, 4000)
KEEP_FIRST, KEEP_LAST = 16, 64
QUERY_CHUNK = 512


@dataclass
class Count:
    """Questions of one kind: asked, answered with the right value, answered word for word."""

    asked: int = 0
    right: int = 0
    exact: int = 0


def choose_questions(document: Document, recall: int, tally: int) -> list[Question]:
    """The first questions of each kind, in the document's own random order."""
    wanted = {"recall": recall, "tally": tally}
    chosen = []
    for question in document.questions:
        if wanted[question.kind]:
            wanted[question.kind] -= 1
            chosen.append(question)
    return chosen


@torch.no_grad()
def forward_evicted(model: RecallModel, ids: Tensor, prompt: int, ratio: float) -> Tensor:
    """Hidden states [T, D] of `ids` [T] when queries behind the prompt see a thinned-out prompt.

    Per layer and key/value head, a prompt key's score is the root mean square, over the prompt's
    queries and the heads of its group, of the attention paid to it.
    """
    rope = rope_tables(len(ids), model.config)
    x = model.embed_tokens(ids[None])
    for layer in model.blocks():
        attention = layer.self_attn
        q, k, v = attention.project(layer.input_layernorm(x), rope)
        heads = torch.empty_like(q)
        group = q.shape[1] // k.shape[1]
        for kv in range(k.shape[1]):
            span = slice(kv * group, (kv + 1) * group)
            heads[0, span] = _evicting_head(q[0, span], k[0, kv], v[0, kv], prompt, ratio)
        x = x + attention.output(heads)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x)[0]


def _evicting_head(q: Tensor, k: Tensor, v: Tensor, prompt: int, ratio: float) -> Tensor:
    """Output [G, T, E] of one head group: q [G, T, E], k and v [T, E]."""
    length = k.shape[0]
    position = torch.arange(length)
    visible = torch.ones(length, dtype=torch.bool)
    squares = torch.zeros(length)
    outputs = []
    bounds = [*range(0, prompt, QUERY_CHUNK), *range(prompt, length, QUERY_CHUNK), length]
    for start, stop in pairwise(bounds):
        if start == prompt:
            keep = round(prompt / ratio)
            squares[:KEEP_FIRST] = squares[prompt - KEEP_LAST : prompt] = torch.inf
            visible[:prompt] = False
            visible[squares[:prompt].topk(max(keep, KEEP_FIRST + KEEP_LAST)).indices] = True
        scores = q[:, start:stop] @ k[:stop].T * k.shape[1] ** -0.5
        seen = (position[:stop] <= position[start:stop, None]) & visible[:stop]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        squares[:stop] += weights.square().sum(dim=(0, 1))
        outputs.append(weights @ v[:stop])
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def score(
    model: RecallModel,
    vocabulary: dict[str, int],
    document: Document,
    questions: list[Question],
    ratio: float,
    counts: dict[str, Count],
) -> None:
    """Ask `questions` one after the other; the first belongs to the prompt that is thinned out."""
    words = list(chat_words(document, questions))
    ids = torch.tensor([vocabulary[word] for word, _ in words])
    roles = torch.tensor([int(role) for _, role in words])
    answering = roles >= Role.ANSWER
    prompt = int(answering.int().argmax())
    hidden = model(ids[None])[0] if ratio == 1 else forward_evicted(model, ids, prompt, ratio)
    guesses = model.logits(hidden[prompt - 1 : -1]).argmax(-1)
    hits = torch.cat((torch.ones(prompt, dtype=torch.bool), guesses == ids[prompt:]))
    spans = torch.diff(answering.int(), prepend=torch.zeros(1, dtype=torch.int))
    starts = (spans == 1).nonzero().flatten().tolist()
    for start, question in zip(starts, questions, strict=True):
        span = slice(start, start + len(question.answer_words) + 1)
        count = counts[question.kind]
        count.asked += 1
        count.right += bool(hits[span][roles[span] > Role.ANSWER].all())
        count.exact += bool(hits[span].all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=list(RECIPES), default=BUNDLED.name)
    parser.add_argument("--model", type=Path, help="default: the recipe's")
    parser.add_argument("--documents", type=int, default=20, help="documents per row")
    parser.add_argument("--questions", type=int, default=12, help="fact questions per document")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--densities", nargs="+", default=("sparse", "dense"))
    parser.add_argument("--evict", type=float, nargs="*", default=[], metavar="RATIO")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="default: benchmarks/out/recall/evaluation.csv")
    where.add_argument("--record", action="store_true", help="replace the committed table instead")
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    place = recipe.folder.relative_to(BENCHMARKS) / "evaluation.csv"
    path = result_path(args.output, args.record, str(place), recorded=BENCHMARKS)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    folder = args.model or recipe.model
    model = load(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    if args.dtype == "bfloat16":
        model = model.bfloat16().float()

    cases = [
        (density, length, ratio)
        for density in args.densities
        for length in args.lengths
        for ratio in (1.0, *args.evict)
    ]
    rows = []
    for density, length, ratio in track(cases, "evaluating"):
        counts = {"recall": Count(), "tally": Count()}
        for seed in range(args.documents):
            document = make_document(seed, length, density, recipe.world)
            questions = choose_questions(document, args.questions, tally=3)
            score(model, vocabulary, document, questions, ratio, counts)
        row = {"density": density, "tokens": length, "eviction": ratio}
        for kind, count in counts.items():
            row[kind] = round(count.right / max(1, count.asked), 4)
            row[f"{kind} asked"] = count.asked
        whole = sum(count.exact for count in counts.values())
        row["whole answer"] = round(whole / sum(count.asked for count in counts.values()), 4)
        rows.append(row)

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(written(path.parent, path.name))


if __name__ == "__main__":
    main()
