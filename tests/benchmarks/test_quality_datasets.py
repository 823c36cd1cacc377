"""QuALITY, LongHealth and RULER: files in their published formats, prompts, parsed answers."""

from __future__ import annotations

import json

import pytest

from benchmarks.quality.datasets import (
    DatasetError,
    Sample,
    load_longhealth,
    load_quality,
    load_ruler,
)
from benchmarks.quality.prompts import chosen_letter, messages, score


def _lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _quality_question(number, label=2):
    return {
        "question": f"Why {number}?",
        "question_unique_id": f"q{number}",
        "options": ["because", "so", "who knows", "never"],
        "gold_label": label,
        "writer_label": label,
        "difficult": 0,
    }


def _quality_line(article, *numbers):
    questions = [_quality_question(number) for number in numbers]
    names = {"article_id": article, "set_unique_id": f"{article}_x", "title": "t"}
    return {**names, "article": f"The article {article}.", "questions": questions}


def test_quality_joins_the_two_sets_of_an_article(tmp_path):
    path = _lines(
        tmp_path / "dev",
        [_quality_line("1", 1, 2), _quality_line("2", 3), _quality_line("1", 4)],
    )
    samples = load_quality(path)
    assert [s.id for s in samples] == ["q1", "q2", "q4", "q3"]
    assert samples[0] == Sample(
        "q1",
        "The article 1.",
        "Why 1?",
        ("because", "so", "who knows", "never"),
        ("B",),
        task="quality",
    )
    assert {s.context for s in load_quality(path, articles=1)} == {"The article 1."}


def test_quality_without_labels_is_refused(tmp_path):
    line = _quality_line("1", 1)
    del line["questions"][0]["gold_label"]
    with pytest.raises(DatasetError, match=r"q1.*gold_label"):
        load_quality(_lines(tmp_path / "test", [line]))
    line["questions"][0]["gold_label"] = 5
    with pytest.raises(DatasetError, match="5 of 4"):
        load_quality(_lines(tmp_path / "test", [line]))
    (tmp_path / "broken").write_text("{\n")
    with pytest.raises(DatasetError, match="line 1: not JSON"):
        load_quality(tmp_path / "broken")


def _patient(number):
    question = {
        "No": 1,
        "question": "Which drug?",
        **{f"answer_{letter}": f"drug {letter}" for letter in "abcde"},
        "correct": "drug c",
        "answer_location": {"text_0": {"start": [0], "end": [1]}},
    }
    return {
        "name": f"Name {number}",
        "birthday": "1.1.1970",
        "diagnosis": "hay fever",
        "texts": {"text_0": f"note of {number}", "text_1": "another"},
        "questions": [question],
    }


def test_longhealth_groups_patients_and_says_whom_a_question_is_about(tmp_path):
    path = tmp_path / "benchmark_v5.json"
    path.write_text(json.dumps({f"patient_{i:02}": _patient(i) for i in range(1, 4)}))
    samples = load_longhealth(path, patients_per_context=2)
    assert [s.id for s in samples] == ["patient_01-1", "patient_02-1", "patient_03-1"]
    assert samples[0].context == samples[1].context != samples[2].context
    assert "<text_0>\nnote of 2\n</text_0>" in samples[0].context
    assert samples[1].answers == ("C",) and len(samples[1].options) == 5
    for part in ("patient_02", "Name 2", "1.1.1970", "hay fever", "Which drug?"):
        assert part in samples[1].question


def test_longhealth_takes_a_letter_and_refuses_another_answer(tmp_path):
    patient = _patient(1)
    path = tmp_path / "benchmark.json"
    patient["questions"][0]["correct"] = "e"
    path.write_text(json.dumps({"patient_01": patient}))
    assert load_longhealth(path)[0].answers == ("E",)
    patient["questions"][0]["correct"] = "drug f"
    path.write_text(json.dumps({"patient_01": patient}))
    with pytest.raises(DatasetError, match="none of the options"):
        load_longhealth(path)


def test_ruler_in_both_published_forms(tmp_path):
    folder = tmp_path / "niah_multikey_1"
    folder.mkdir()
    record = {
        "index": 7,
        "input": "Some magic numbers.\nOne is 12.\nWhat is the number?",
        "outputs": ["12"],
        "length": 20,
        "answer_prefix": " The number is",
    }
    _lines(folder / "validation.jsonl", [record])
    kvpress = {
        "context": "Words.",
        "question": "Which?",
        "answer_prefix": "Answer:",
        "answer": ["a", "b"],
        "task": "cwe",
        "max_new_tokens": 120,
    }
    _lines(tmp_path / "zzz.jsonl", [kvpress])
    first, second = load_ruler(tmp_path)
    assert first == Sample(
        "niah_multikey_1-7",
        "Some magic numbers.\nOne is 12.",
        "What is the number?",
        answers=("12",),
        answer_prefix="The number is",
        task="niah_multikey_1",
    )
    assert second.id == "cwe-0" and second.max_tokens == 120 and second.answers == ("a", "b")
    with pytest.raises(DatasetError, match="context"):
        load_ruler(_lines(tmp_path / "one.jsonl", [{"input": "no question", "outputs": ["1"]}]))


def test_prompts_have_two_user_turns_and_lettered_options():
    sample = Sample("1", "The context.", "Which?", ("x", "y"), ("A",))
    chat = messages(sample)
    assert [m["role"] for m in chat] == ["system", "user", "user"]
    assert chat[1]["content"] == "The context."
    assert "Which?\nA. x\nB. y\n" in chat[2]["content"]
    joined = messages(sample, one_turn=True)
    assert [m["role"] for m in joined] == ["system", "user"]
    assert joined[1]["content"].startswith("The context.\n\nWhich?")
    begun = Sample("1", "c", "q", answers=("x",), answer_prefix="It is")
    assert messages(begun)[-1]["role"] == "user"
    prefixed = messages(begun, prefix=True)
    assert prefixed[-1] == {"role": "assistant", "content": "It is"}
    assert "letter" not in prefixed[2]["content"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("Surely A or B.\nThe answer is B.", "B"),
        ("The answer is: **C**, not D", "C"),
        ("The answer is a matter of taste: B", "B"),
        ("A reason.\nAnother.\nC", "C"),
        ("<think>It must be A. A!</think>\nB", "B"),
        ("<think>It must be A. The answer is A</think>\nSo: C", "C"),
        ("I'd say D.", "D"),
        ("E", None),
        ("<think>A, or perhaps B\nhm, ", None),
        ("Because of the weather", None),
        ("", None),
    ],
)
def test_letters_are_read_as_in_the_paper(text, letter):
    assert chosen_letter(text, 4) == letter


def test_scores():
    choice = Sample("1", "c", "q", ("x", "y"), ("B",))
    assert score(choice, "B") == (1.0, True)
    assert score(choice, "A") == (0.0, True)
    assert score(choice, "no idea") == (0.0, False)
    several = Sample("1", "c", "q", answers=("12", "Foo"), task="niah_multivalue")
    assert score(several, "they are foo and 13") == (0.5, True)
    assert score(several, "<think>12</think>foo") == (0.5, True)
    assert score(several, " ") == (0.0, False)
    alternatives = Sample("1", "c", "q", answers=("12", "Foo"), task="qa_1")
    assert score(alternatives, "foo") == (1.0, True)
