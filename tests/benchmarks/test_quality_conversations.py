"""Conversations of the recall benchmark: what is asked where, and how it is graded."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from benchmarks.quality.conversations import (
    KINDS,
    Conversation,
    Mode,
    SuffixScore,
    Target,
    grade,
    make_conversations,
    paraphrased_turn,
)
from benchmarks.recall.documents import make_document
from benchmarks.recall.recipe import BUNDLED, RECIPES


def _text(ids, recipe=BUNDLED):
    words = {number: word for word, number in recipe.vocabulary.items()}
    return " ".join(words[i] for i in ids)


def _tells(text, questions):
    """The questions whose answers stand in the text, word for word."""
    return [q for q in questions if " ".join(word for word, _ in q.answer_words) in text]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("density", ["sparse", "dense"])
def test_questions_come_after_the_document(density, recipe):
    (conversation,) = make_conversations(3, 700, density, Mode.AFTER, 4, 3, 1, recipe)
    document = make_document(3, 700, density, recipe.world)
    assert _text(conversation.prompt[2:], recipe) == " ".join(word for word, _ in document.words)
    kinds = ["restated"] * 3 + ["recall"] * 4 + ["tally"]
    assert [target.kind for target in conversation.targets] == kinds
    facts = [q for q in document.questions if q.kind == "recall"]
    votes = [q for q in document.questions if q.kind == "tally"]
    expected = [q.value for q in facts[4:7] + facts[:4] + votes[:1]]
    said = [_text((conversation.suffix[i] for i in t.value), recipe) for t in conversation.targets]
    assert said == expected
    for target in conversation.targets:
        assert set(target.value) <= set(target.answer)


def test_restatements_are_of_other_facts_in_other_words():
    (conversation,) = make_conversations(5, 700, "sparse", Mode.AFTER, 4, 4, 0)
    facts = [q for q in make_document(5, 700, "sparse").questions if q.kind == "recall"]
    suffix, end = _text(conversation.suffix), conversation.targets[3].value.stop
    retold = _text(conversation.suffix[:end])
    assert not _tells(suffix, facts[4:8]), "the answer's own words tell what the text tells again"
    for fact in facts[4:8]:
        assert fact.value in retold
    assert _tells(suffix, facts[:4]) == facts[:4]
    assert not _tells(retold, facts[:4])


def test_a_question_in_the_prompt_leaves_only_its_answer():
    conversations = make_conversations(3, 700, "sparse", Mode.IN_PROMPT, 3, 3, 1)
    assert [c.targets[0].kind for c in conversations] == ["recall"] * 3 + ["tally"]
    for conversation in conversations:
        assert _text(conversation.prompt[-3:]) == "<|im_end|> <|im_start|> assistant"
        assert conversation.targets[0].answer == range(len(conversation.suffix))
        # The engine compacts within two tokens; the value must not come before.
        assert conversation.targets[0].value.start >= 4


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_paraphrases_ask_the_same_of_the_same_person(recipe):
    world = recipe.world
    for question in make_document(1, 2000, "dense", world).questions:
        words = [word for word, _ in paraphrased_turn(question, world)[:-3]]
        assert words != [word for word, _ in question.question_words]
        answer = " ".join(word for word, _ in question.answer_words)
        people = [f"{a} {b}" for a, b in pairwise(answer.split()) if a in world.first_names]
        assert len(people) == 1 and people[0] in " ".join(words)


def test_an_answer_is_right_when_its_whole_value_is_the_most_likely():
    targets = (
        Target("recall", range(1, 3), range(0, 4)),
        Target("tally", range(4, 5), range(4, 6)),
    )
    conversation = Conversation((1,), (1, 2, 3, 4, 5, 6), targets)
    log_probs = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]

    def counts(*most_likely):
        result = grade([conversation], [SuffixScore(log_probs, [bool(x) for x in most_likely])])
        assert result.nll == pytest.approx(21 / 6)
        return [result.counts[kind].right for kind in KINDS]

    assert counts(0, 1, 1, 0, 1, 0) == [1, 0, 1]  # words around the value do not count
    assert counts(1, 1, 0, 1, 0, 1) == [0, 0, 0]
    result = grade([conversation], [SuffixScore(log_probs, [True] * 6)])
    assert result.counts["recall"].share == 1
    assert math.isnan(result.counts["restated"].share)


def test_scores_of_another_length_are_refused():
    conversation = Conversation((1,), (1, 2), ())
    with pytest.raises(ValueError, match="1 tokens for 2"):
        grade([conversation], [SuffixScore([0.0], [True])])
