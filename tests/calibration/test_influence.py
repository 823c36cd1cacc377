"""Influence curves on the bundled recall model, through its Hugging Face implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.recall.documents import make_document, messages

MODEL = Path(__file__).parents[2] / "benchmarks" / "recall" / "model"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model():
    from vllm_am.calibration.hf_model import CalibrationModel

    return CalibrationModel(str(MODEL), "cpu", torch.float32)


def chat(seed: int, tokens: int = 400) -> dict[str, str]:
    """One document with a question, split at the question."""
    from transformers import AutoTokenizer

    document = make_document(seed=seed, tokens=tokens, density="sparse")
    question = document.questions[0]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = tokenizer.apply_chat_template(
        messages(document, question), tokenize=False, add_generation_prompt=True
    )
    before, after = text.rsplit(question.text, 1)
    return {"context": before, "question": question.text + after, "answer": question.answer}


@pytest.fixture(scope="module")
def document(model):
    from vllm_am.calibration.influence import Document

    entry = chat(0)
    ids = {k: model.tokenizer.encode(v, add_special_tokens=False) for k, v in entry.items()}
    return Document(
        tuple(ids["context"]), tuple(ids["question"] + ids["answer"]), len(ids["answer"])
    )


def test_whole_context_scores_as_transformers_does(model, document):
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokens = torch.tensor([document.context + document.continuation])
    with torch.no_grad():
        logits = stock(tokens).logits[0].log_softmax(-1)
    scored = range(tokens.shape[1] - document.scored, tokens.shape[1])
    expected = sum(float(logits[i - 1, tokens[0, i]]) for i in scored) / document.scored
    layers = model.read(document.context)
    found = model.log_likelihood(
        document.continuation, layers, len(document.context), document.scored
    )
    assert found == pytest.approx(expected, abs=1e-4)
    assert expected > -0.5, "the model must know the answer"


def test_curves_fall_and_a_second_run_measures_nothing(model, document, tmp_path, monkeypatch):
    from vllm_am.calibration.influence import Plan, measure

    plan, journal = Plan(0.1, (0.0, 0.1, 0.8), "highest-attention"), tmp_path / "journal.jsonl"
    seen = []
    curves = measure(
        model, [document], plan, journal, lambda done, total: seen.append(done / total)
    )
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert set(curves) == {f"L{layer}H{head}" for layer in range(4) for head in range(2)}
    falls = {head: dict(curve)[0.0] - dict(curve)[0.8] for head, curve in curves.items()}
    assert max(falls.values()) > 0.05, "some head carries the facts"
    assert max(falls.values()) > 3 * sorted(falls.values())[len(falls) // 2], "and most do not"

    monkeypatch.setattr(model, "read", lambda tokens: pytest.fail("measured again"))
    assert measure(model, [document], plan, journal, lambda done, total: None) == curves
    other = Plan(0.2, plan.points, plan.method)
    with pytest.raises(ValueError, match="other options"):
        measure(model, [document], other, journal, lambda done, total: None)


@pytest.mark.slow
def test_command_writes_a_budgets_file(tmp_path):
    from vllm_am.cli import app
    from vllm_am.config import CompactionConfig

    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps(chat(seed, 300)) + "\n" for seed in range(2)))
    out = tmp_path / "budgets.json"
    arguments = ["budgets", str(MODEL), "--documents", str(documents), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    config = CompactionConfig.from_dict({"budgets": str(out)})
    config.check_heads(layers=range(4), kv_heads=2)
    assert sum(config.budgets.values()) == pytest.approx(1.0)
    assert max(config.budgets.values()) > 1.5 / 8, "heads differ"
    assert out.with_suffix(".png").stat().st_size > 1000
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no documents"), ('{"context": "a"}', "without answer, question")],
    ids=["empty", "fields"],
)
def test_bad_documents_are_named(tmp_path, content, message):
    from vllm_am.cli import app

    path = tmp_path / "documents.jsonl"
    path.write_text(content)
    result = CliRunner().invoke(app, ["budgets", str(MODEL), "--documents", str(path)])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
