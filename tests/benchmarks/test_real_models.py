"""Real models and texts: fetched, checked, converted; the harness that asks them."""

from __future__ import annotations

import hashlib
import zipfile

import pytest
import torch

from benchmarks.quality import text as quality_text
from benchmarks.quality.conversations import SuffixScore
from benchmarks.real_models import catalogue, packages
from benchmarks.real_models.llama import split_halves
from benchmarks.real_models.packages import PackageFile, Unavailable, fetch


def test_rows_go_back_to_halves():
    """The order of GGUF files: pairs (i, i + D/2) of each head are neighbours there."""
    heads, dim = 3, 8
    rows = torch.arange(heads * dim * 2).view(heads * dim, 2)
    neighbours = rows.view(heads, 2, dim // 2, 2).transpose(1, 2).reshape(rows.shape)
    assert torch.equal(split_halves(neighbours, heads), rows)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one wheel, of one file."""
    wheel = tmp_path / "index" / "thing-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/data.txt", "a text")
        archive.writestr("thing-1.0.dist-info/METADATA", "Name: thing\nVersion: 1.0\n")
        archive.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("thing-1.0.dist-info/RECORD", "")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


DIGEST = hashlib.sha256(b"a text").hexdigest()


def test_a_file_is_fetched_and_checked(index, tmp_path):
    target = tmp_path / "cache" / "data.txt"
    fetch(PackageFile("thing==1.0", "thing/data.txt", DIGEST), target)
    assert target.read_text() == "a text"
    assert [p.name for p in target.parent.iterdir()] == ["data.txt"], "nothing else is left"


@pytest.mark.parametrize(
    ("package", "path", "digest", "message"),
    [
        ("thing==2.0", "thing/data.txt", DIGEST, "cannot be downloaded"),
        ("thing==1.0", "thing/other.txt", DIGEST, "has no thing/other.txt"),
        ("thing==1.0", "thing/data.txt", "0" * 64, "has SHA-256"),
    ],
)
def test_what_cannot_be_had_is_said(index, tmp_path, package, path, digest, message):
    target = tmp_path / "cache" / "data.txt"
    with pytest.raises(Unavailable, match=message):
        fetch(PackageFile(package, path, digest), target)
    assert not list(target.parent.iterdir())


def test_an_index_that_does_not_answer(tmp_path, monkeypatch):
    def never(*args, timeout, **kwargs):
        raise packages.subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(packages.subprocess, "run", never)
    with pytest.raises(Unavailable, match="no answer"):
        fetch(PackageFile("thing==1.0", "thing/data.txt", DIGEST), tmp_path / "data.txt")


class Words:
    """A tokenizer of words."""

    def __init__(self):
        self.known: dict[str, int] = {}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        pieces = text.replace("\n", " \n ").split(" ")
        return [self.known.setdefault(piece, len(self.known)) for piece in pieces if piece]

    def decode(self, ids):
        words = list(self.known)
        return " ".join(words[i] for i in ids)


def test_a_document_holds_its_facts_and_asks_for_them():
    words = Words()
    text = " ".join(f"word{i}" for i in range(5000))
    conversation = quality_text.make_document(words, text, seed=1, tokens=1000)
    assert len(conversation.prompt) == 1000
    whole = words.decode(conversation.prompt)
    kinds = [target.kind for target in conversation.targets]
    assert kinds == ["continuation", *["passages"] * 3, *["facts"] * 8]
    for target in conversation.targets[1:]:
        value = words.decode(conversation.suffix[i] for i in target.value)
        asked = words.decode(conversation.suffix[: target.value.start])
        assert value.rstrip(".") in whole, "what is asked for was told"
        assert asked
    continued = words.decode(conversation.suffix[: quality_text.CONTINUATION_TOKENS])
    assert continued in text and whole.endswith(text[: text.index(continued)].split(" ")[-2])


def test_known_counts_tokens_and_whole_facts():
    words = Words()
    text = " ".join(f"word{i}" for i in range(5000))
    conversation = quality_text.make_document(words, text, seed=2, tokens=1000)
    count = len(conversation.suffix)
    everything = quality_text.known(conversation, SuffixScore([-1.0] * count, [True] * count))
    assert everything.facts == 8 and everything.nll == pytest.approx(1.0)
    assert everything.tokens["passages"] == 3 * quality_text.PASSAGE_TOKENS
    likely = [True] * count
    likely[conversation.targets[-1].value[0]] = False
    assert quality_text.known(conversation, SuffixScore([-1.0] * count, likely)).facts == 7


def test_shares_come_with_an_interval():
    assert quality_text.share([8, 6], [8, 6]) == (1.0, 0.0)
    mean, half = quality_text.share([8, 0, 4, 6], [8, 8, 8, 8])
    assert mean == pytest.approx(18 / 32) and 0.2 < half < 0.5
    assert all(x != x for x in quality_text.share([0.0], [0.0]))


@pytest.fixture(scope="module")
def smollm():
    """A real model of 135 M parameters."""
    try:
        catalogue.find_text("play")
        return catalogue.find_model("smollm2-135m")
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.engine
def test_a_real_model_keeps_a_real_text(smollm):
    """A quarter of the memory; at a full one nothing is lost."""
    rows = list(
        quality_text.measure(smollm, {"default": {}}, [1.0, 0.25], ["play"], seeds=1, tokens=1024)
    )
    full, exact, compacted = rows
    assert full["of facts"] >= 4, "the model reads the text"
    for column in ("passages, tokens", "facts, tokens", "whole facts"):
        assert exact[column] == 1.0
    assert exact["nll"] == pytest.approx(full["nll"], abs=1e-3)
    assert compacted["blocks"] < 0.45 * full["blocks"] and not compacted["failures"]
    assert compacted["passages, tokens"] >= 0.6
