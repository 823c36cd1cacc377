"""What a world of documents is made of: its people, their facts, its votes and its small talk.

Templates are written as space-separated words, which is also how the tokenizer splits them.
``{P}`` stands for a person, ``{V}`` for a value, ``{W}`` for somebody who votes; any other
``{name}`` is drawn from ``slots``. In every template the person and the relation stand before the
value: a reader can then predict the value when the fact has been told before, and the model looks
back in the same way while it reads and while it answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product


def words(text: str) -> tuple[str, ...]:
    """Of a text, by spaces."""
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    """Of a text, by commas."""
    return tuple(part.strip() for part in text.split(","))


def pairs(first: str, second: str) -> tuple[str, ...]:
    """Every word of the one before every word of the other."""
    return tuple(f"{a} {b}" for a, b in product(first.split(), second.split()))


@dataclass(frozen=True)
class Attribute:
    """One kind of fact about a person.

    `answer` is the sentence the assistant gives and also one of the ways the text may tell the
    fact; at least four words stand in it before the value.
    """

    name: str
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class World:
    """All that documents of one kind can be made of."""

    name: str
    first_names: tuple[str, ...]
    surnames: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    restate_prefixes: tuple[str, ...]
    asked: tuple[str, ...]
    """A question with its answer in the text: ``{Q}``, ``{A}``."""
    offices: tuple[str, ...]
    """What people vote that somebody should become."""
    vote_statements: tuple[str, ...]
    vote_questions: tuple[str, ...]
    vote_answer: str
    voters: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]
    fillers: tuple[str, ...]
    person_filler_share: float = 0.15
    """Of the small talk, what is about the people of the facts."""


CHAT_WORDS = words("user assistant system")
PUNCTUATION = words(". , ? ! : ; ' \" ( ) -")
