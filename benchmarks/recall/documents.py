"""Documents about a small world, with questions whose answers stand in them.

A document mixes facts (person, relation, value), votes, and small talk. Most facts are told more
than once, in other words or as a question with its answer, so that whoever predicts the text has to
look back in it exactly as somebody who answers a question does. Everything is a function of the
seed: `make_document` draws from streams named ``held-out-...`` and training from ``train-...``, so
the two never share a document.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from benchmarks.recall.harbour import HARBOUR
from benchmarks.recall.world import Attribute, World


class Role(IntEnum):
    """What a word is to the model that predicts it."""

    PLAIN = 0  # ordinary text, chat scaffolding and questions
    FIRST = 1  # a value told for the first time: cannot be predicted
    AGAIN = 2  # a value told before in the same document
    VOTE = 3  # a vote: the best guess is the option that leads so far
    ANSWER = 4  # the words of an answer around its value
    RECALL = 5  # the value in an answer about a fact
    TALLY = 6  # the value in an answer about a vote


Word = tuple[str, Role]


@dataclass(frozen=True)
class Density:
    """How much a document tells: rates per 1,000 tokens, counts of mentions and of attributes."""

    facts: float
    votes: float
    mentions: tuple[float, float, float]  # probability of telling a fact once, twice, three times
    attributes: int | None = None  # different ones in a document; None: all there are


DENSITIES = {
    "sparse": Density(facts=15, votes=16, mentions=(0.1, 0.5, 0.4)),
    "dense": Density(facts=28, votes=16, mentions=(0.1, 0.6, 0.3)),
}


@dataclass(frozen=True)
class Question:
    """A question, the full sentence that answers it, and the value that sentence ends in."""

    text: str
    answer: str
    value: str
    kind: str  # "recall" or "tally"
    question_words: tuple[Word, ...]
    answer_words: tuple[Word, ...]


@dataclass(frozen=True)
class Document:
    """A text of about the requested number of tokens, and every question it answers."""

    text: str
    questions: list[Question]
    words: list[Word]


@dataclass(frozen=True)
class _Fact:
    person: str
    attribute: Attribute
    value: str

    def sentence(self, template: str, role: Role) -> list[Word]:
        return _fill(template, {"{P}": self.person, "{V}": self.value}, role)


def make_document(
    seed: int, tokens: int = 2000, density: str = "sparse", world: World = HARBOUR
) -> Document:
    """The held-out document of this seed: about `tokens` long, "sparse" or "dense" in facts."""
    place = "" if world is HARBOUR else f"{world.name}-"
    rng = random.Random(f"held-out-{place}{density}-{tokens}-{seed}")
    return generate(rng, tokens, DENSITIES[density], world)


def training_density(rng: random.Random, world: World = HARBOUR) -> Density:
    """A density around the two named ones, for training.

    Often the facts are of a few attributes only, so that the person alone tells them apart, or
    votes make up most of the text, so that even a short document has a majority.
    """
    once = rng.choice((0.0, 0.1, 0.3))
    votes = rng.choice((8, 16, 30, 70))
    return Density(
        facts=rng.uniform(12, 32) * (1 if votes < 70 else 0.3),
        votes=votes,
        mentions=(once, 0.6, 0.4 - once),
        attributes=rng.choice((1, 2, 4, len(world.attributes))),
    )


def generate(rng: random.Random, tokens: int, density: Density, world: World = HARBOUR) -> Document:
    """Draw a document of about `tokens` tokens."""
    facts = _draw_facts(
        rng, world, max(2, round(density.facts * tokens / 1000)), density.attributes
    )
    events: list[_Fact | list[Word]] = []
    for fact in facts:
        events += [fact] * rng.choices((1, 2, 3), density.mentions)[0]
    people = sorted({fact.person for fact in facts})
    ballots = _draw_ballots(rng, world, people, round(density.votes * tokens / 1000))
    for person, _, votes in ballots:
        voters = rng.sample(world.voters, len(votes))
        events += [_vote(rng, world, person, *vote) for vote in zip(voters, votes, strict=True)]
    rng.shuffle(events)

    told: set[_Fact] = set()
    sentences: list[list[Word]] = []
    for event in events:
        if isinstance(event, list):
            sentences.append(event)
        else:
            sentences.append(_mention(rng, world, event, event in told))
            told.add(event)

    length = sum(map(len, sentences))
    while length < tokens - 5:
        filler = _filler(rng, world, people)
        length += len(filler)
        sentences.insert(rng.randint(0, len(sentences)), filler)

    questions = [_recall_question(rng, fact) for fact in facts]
    questions += [_tally_question(rng, world, person, winner) for person, winner, _ in ballots]
    rng.shuffle(questions)
    return Document(
        text=_typeset(rng, sentences),
        questions=questions,
        words=[word for sentence in sentences for word in sentence],
    )


def messages(document: Document, question: Question) -> list[dict[str, str]]:
    """The chat that asks `question` about `document`, in the format the model was trained on."""
    return [{"role": "user", "content": f"{document.text}\n\n{question.text}"}]


def is_correct(question: Question, answer_text: str) -> bool:
    """Whether the first sentence of `answer_text` ends in exactly the value asked for."""
    sentence = re.split(r"[.!?\n]", answer_text.strip(), maxsplit=1)[0]
    said = re.findall(r"\w+", sentence.lower())
    value = question.value.lower().split()
    return said[-len(value) :] == value


def chat_words(document: Document, questions: Sequence[Question]) -> Iterator[Word]:
    """The conversation that asks `questions` in turn, as the chat template writes it."""
    plain, answer = Role.PLAIN, Role.ANSWER
    yield from (("<|im_start|>", plain), ("user", plain))
    yield from document.words
    for i, question in enumerate(questions):
        if i:
            yield from (("<|im_start|>", plain), ("user", plain))
        yield from question.question_words
        yield from (("<|im_end|>", plain), ("<|im_start|>", plain), ("assistant", plain))
        yield from question.answer_words
        yield ("<|im_end|>", answer)


def _draw_facts(
    rng: random.Random, world: World, count: int, attributes: int | None
) -> list[_Fact]:
    """`count` facts about people with distinct first names and distinct surnames."""
    attributes = attributes or len(world.attributes)
    per_person = min(rng.uniform(2, 5), attributes)
    number = max(2, min(len(world.first_names), round(count / per_person)))
    first = rng.sample(world.first_names, number)
    people = [f"{a} {b}" for a, b in zip(first, rng.sample(world.surnames, number), strict=True)]
    told = rng.sample(world.attributes, attributes)
    pairs = [(person, attribute) for person in people for attribute in told]
    chosen = rng.sample(pairs, min(count, len(pairs)))
    return [_Fact(person, a, rng.choice(a.values)) for person, a in chosen]


def _draw_ballots(
    rng: random.Random, world: World, people: Sequence[str], count: int
) -> list[tuple[str, str, list[str]]]:
    """(person, office that wins, votes), about `count` votes in all; the winner leads clearly."""
    if count < 4:
        return []
    number = max(1, min(count // 10, len(people)))
    size = min(count // number, len(world.voters))
    drawn = []
    for person in rng.sample(people, number):
        winner, *others = rng.sample(world.offices, rng.choice((2, 3)))
        winning = round(size * rng.uniform(0.6, 0.8))
        votes = [winner] * winning + [others[i % len(others)] for i in range(size - winning)]
        drawn.append((person, winner, votes))
    return drawn


def _vote(rng: random.Random, world: World, person: str, voter: str, office: str) -> list[Word]:
    filled = {"{P}": person, "{W}": voter, "{V}": office}
    return _fill(rng.choice(world.vote_statements), filled, Role.VOTE)


def _mention(rng: random.Random, world: World, fact: _Fact, told: bool) -> list[Word]:
    """Tell a fact: plainly the first time; afterwards as a reminder or a question with answer."""
    statement = rng.choice((fact.attribute.answer, *fact.attribute.statements))
    if not told:
        return fact.sentence(statement, Role.FIRST)
    if rng.random() < 0.35:
        question = rng.choice(fact.attribute.questions)
        asked = rng.choice(world.asked)
        template = asked.replace("{Q}", question).replace("{A}", fact.attribute.answer)
        return fact.sentence(template, Role.AGAIN)
    return fact.sentence(f"{rng.choice(world.restate_prefixes)} {statement}", Role.AGAIN)


def _filler(rng: random.Random, world: World, people: Sequence[str]) -> list[Word]:
    by_person = rng.random() < world.person_filler_share
    template = rng.choice([f for f in world.fillers if ("{P}" in f) == by_person])
    filled = {f"{{{name}}}": rng.choice(options) for name, options in world.slots.items()}
    return _fill(template, {**filled, "{P}": rng.choice(people)}, Role.PLAIN)


def _recall_question(rng: random.Random, fact: _Fact) -> Question:
    asked = _fill(rng.choice(fact.attribute.questions), {"{P}": fact.person}, Role.PLAIN)
    answer = fact.sentence(fact.attribute.answer, Role.RECALL)
    return _question(asked, answer, fact.value, "recall")


def _tally_question(rng: random.Random, world: World, person: str, winner: str) -> Question:
    asked = _fill(rng.choice(world.vote_questions), {"{P}": person}, Role.PLAIN)
    answer = _fill(world.vote_answer, {"{P}": person, "{V}": winner}, Role.TALLY)
    return _question(asked, answer, winner, "tally")


def _question(asked: list[Word], answer: list[Word], value: str, kind: str) -> Question:
    words = tuple((word, Role.ANSWER if role is Role.PLAIN else role) for word, role in answer)
    return Question(join(asked), join(answer), value, kind, tuple(asked), words)


def _fill(template: str, filled: dict[str, str], value_role: Role) -> list[Word]:
    """Words of a template; those of ``{V}`` carry `value_role`. Starts with a capital letter."""
    words: list[Word] = []
    for part in template.split():
        role = value_role if part == "{V}" else Role.PLAIN
        words += [(word, role) for word in filled.get(part, part).split()]
    first, role = words[0]
    words[0] = (first[0].upper() + first[1:], role)
    return words


def join(words: Sequence[Word]) -> str:
    """Readable text: spaces between words, none before punctuation."""
    return re.sub(r" ([.,?!:;])", r"\1", " ".join(word for word, _ in words))


def _typeset(rng: random.Random, sentences: Sequence[Sequence[Word]]) -> str:
    """Sentences in paragraphs of five to nine."""
    paragraphs, start = [], 0
    while start < len(sentences):
        stop = start + rng.randint(5, 9)
        paragraphs.append(" ".join(join(sentence) for sentence in sentences[start:stop]))
        start = stop
    return "\n\n".join(paragraphs)
