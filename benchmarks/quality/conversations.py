"""Held-out documents as conversations: what is read, what is asked, and how answers are graded.

A conversation is a prompt, which is read and compacted, and a suffix, which is then forced on the
model token by token. What counts is what the model would have said: an answer is right when each
token of its value was the most likely one, which is when greedy decoding would have written it.

Modes:

- ``question-after``: the prompt is the document alone; questions come after the compaction, in
  turn, so that the compaction cannot have known them. One conversation per document.
- ``question-in-prompt``: the prompt ends in a question, as when a user sends document and question
  in one request. One conversation per question.

Kinds of questions:

- ``recall``: a fact, asked for in a chat turn;
- ``restated``: a fact that the text itself goes on to tell again in other words (the compacted
  document is read on); facts that are asked for elsewhere are not told again here;
- ``tally``: which office most people voted for, an answer that no single place in the text holds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from benchmarks.recall.documents import Question, Role, Word, make_document
from benchmarks.recall.recipe import BUNDLED, Recipe
from benchmarks.recall.world import Attribute, World

RECALL, RESTATED, TALLY = "recall", "restated", "tally"
KINDS = (RECALL, RESTATED, TALLY)
#: Words that are the value asked for.
_VALUE_ROLES = (Role.AGAIN, Role.RECALL, Role.TALLY)


class Mode(StrEnum):
    """Where the questions stand; see the module."""

    AFTER = "question-after"
    IN_PROMPT = "question-in-prompt"


@dataclass(frozen=True)
class Target:
    """An answer within a suffix.

    Attributes:
        kind: one of ``KINDS``.
        value: positions of the tokens of the value asked for.
        answer: positions of all tokens whose probability is measured (the value's among them).
    """

    kind: str
    value: range
    answer: range


@dataclass(frozen=True)
class Conversation:
    """Token ids of a prompt and of what is forced after it, and the answers in the latter."""

    prompt: tuple[int, ...]
    suffix: tuple[int, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class SuffixScore:
    """What a model thought of a suffix that was forced on it, by token.

    Attributes:
        log_probs: natural logarithms of the probabilities of the forced tokens.
        most_likely: whether the forced token was the most likely one.
    """

    log_probs: Sequence[float]
    most_likely: Sequence[bool]


@dataclass(frozen=True)
class Count:
    """Questions of one kind, and how many were answered right."""

    right: int = 0
    asked: int = 0

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else float("nan")


@dataclass(frozen=True)
class Grade:
    """All conversations of one configuration.

    Attributes:
        counts: by kind.
        nll: mean negative log-probability of an answer's token, in nats: the log-perplexity of
            the reference answers.
    """

    counts: dict[str, Count]
    nll: float


def make_conversations(
    seed: int,
    tokens: int,
    density: str,
    mode: Mode,
    recall: int = 14,
    restated: int = 6,
    tally: int = 3,
    recipe: Recipe = BUNDLED,
) -> list[Conversation]:
    """The conversations about the held-out document of this seed.

    Args:
        tokens: length of the document, about.
        density: "sparse" or "dense" in facts.
        recall, restated, tally: questions of each kind, at most. Sentences that restate a fact
            cannot be asked for within a prompt: their value would come at once.
        recipe: of the model that reads it.
    """
    document = make_document(seed, tokens, density, recipe.world)
    facts = [q for q in document.questions if q.kind == "recall"]
    votes = [q for q in document.questions if q.kind == "tally"]
    asked = facts[:recall] + votes[:tally]
    ids = recipe.vocabulary
    plain = Role.PLAIN
    opening: list[Word] = [("<|im_start|>", plain), ("user", plain), *document.words]
    if mode is Mode.IN_PROMPT:
        return [
            _conversation(ids, [*opening, *question_turn(q)], [(q.kind, _answer(q))]) for q in asked
        ]
    retold = facts[recall : recall + restated]
    rng = random.Random(f"restated-{density}-{tokens}-{seed}")
    pieces = [(RESTATED, _restate(rng, question, recipe.world)) for question in retold]
    for number, question in enumerate(asked):
        user: list[Word] = [("<|im_start|>", plain), ("user", plain)] if number else []
        pieces.append(("", [*user, *question_turn(question)]))
        pieces.append((question.kind, _answer(question)))
    return [_conversation(ids, opening, pieces)]


def question_turn(question: Question) -> list[Word]:
    """A question and the header of its answer, as they follow a document."""
    return _turn(question.question_words)


def paraphrased_turn(question: Question, world: World) -> list[Word]:
    """The same in other words than the question has."""
    asked = " ".join(word for word, _ in question.question_words)
    if question.kind == TALLY:
        person = next(
            " ".join(pair)
            for pair in pairwise(word for word, _ in question.answer_words)
            if pair[0] in world.first_names
        )
        templates: tuple[str, ...] = world.vote_questions
    else:
        attribute, person = _fact(question, world)
        templates = attribute.questions
    others = (t.replace("{P}", person) for t in templates)
    other = next(text for text in others if text != asked)
    return _turn([(word, Role.PLAIN) for word in other.split()])


def grade(conversations: Sequence[Conversation], scores: Sequence[SuffixScore]) -> Grade:
    """Right answers by kind, and the log-perplexity of the reference answers."""
    right = dict.fromkeys(KINDS, 0)
    asked = dict.fromkeys(KINDS, 0)
    total, tokens = 0.0, 0
    for conversation, score in zip(conversations, scores, strict=True):
        if len(score.log_probs) != len(conversation.suffix):
            raise ValueError(
                f"scores of {len(score.log_probs)} tokens for {len(conversation.suffix)}"
            )
        for target in conversation.targets:
            asked[target.kind] += 1
            right[target.kind] += all(score.most_likely[i] for i in target.value)
            total -= sum(score.log_probs[i] for i in target.answer)
            tokens += len(target.answer)
    counts = {kind: Count(right[kind], asked[kind]) for kind in KINDS}
    return Grade(counts, total / tokens if tokens else float("nan"))


def _turn(words: Sequence[Word]) -> list[Word]:
    plain = Role.PLAIN
    return [*words, ("<|im_end|>", plain), ("<|im_start|>", plain), ("assistant", plain)]


def _answer(question: Question) -> list[Word]:
    return [*question.answer_words, ("<|im_end|>", Role.ANSWER)]


def _restate(rng: random.Random, question: Question, world: World) -> list[Word]:
    """A sentence that tells the fact of a question again, not in the words of its answer."""
    attribute, person = _fact(question, world)
    prefix = rng.choice([p for p in world.restate_prefixes if p])
    sentence = f"{prefix} {rng.choice(attribute.statements)}".replace("{P}", person)
    words: list[Word] = []
    for part in sentence.split():
        if part == "{V}":
            words += [(word, Role.AGAIN) for word in question.value.split()]
        else:
            words.append((part, Role.PLAIN))
    first, role = words[0]
    return [(first[0].upper() + first[1:], role), *words[1:]]


def _fact(question: Question, world: World) -> tuple[Attribute, str]:
    """What a question about a fact is about, and whom."""
    answer = [word for word, _ in question.answer_words]
    for attribute in world.attributes:
        # Where the person stands in an answer: two words.
        start = attribute.answer.split().index("{P}")
        person = " ".join(answer[start : start + 2])
        told = attribute.answer.replace("{P}", person).replace("{V}", question.value)
        if told[:1].upper() + told[1:] == " ".join(answer):
            return attribute, person
    raise ValueError(f"no relation is answered by {' '.join(answer)!r}")


def _conversation(
    ids: dict[str, int],
    prompt: Sequence[Word],
    pieces: Sequence[tuple[str, list[Word]]],
) -> Conversation:
    """Token ids, and targets from the roles of the words; of a restatement only its value."""
    suffix: list[int] = []
    targets = []
    for kind, words in pieces:
        start = len(suffix)
        suffix += [ids[word] for word, _ in words]
        if kind:
            roles = [role for _, role in words]
            value = [start + i for i, role in enumerate(roles) if role in _VALUE_ROLES]
            span = range(value[0], value[-1] + 1)
            answer = span if kind == RESTATED else range(start, len(suffix))
            targets.append(Target(kind, span, answer))
    return Conversation(tuple(ids[word] for word, _ in prompt), tuple(suffix), tuple(targets))
