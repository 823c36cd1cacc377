"""Where every script writes: a folder that git ignores, the committed one, or one that is named."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer

from benchmarks import folders

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Script:
    """A command, and the paths that it writes to, relative to the repository.

    Attributes:
        module: as for ``python -m``.
        arguments: what it needs at least.
        where: the module that asks for the path, if it is another one.
        option: names another place.
    """

    module: str
    out: str
    recorded: str
    arguments: tuple[str, ...] = ()
    where: str = ""
    option: str = "--output"


def question_answering(dataset: str) -> Script:
    return Script(
        "benchmarks.quality",
        f"benchmarks/out/quality-{dataset}",
        f"benchmarks/results/quality-{dataset}",
        (dataset, "--data", __file__, "--model", "none"),
        "benchmarks.quality.question_answering",
    )


SCRIPTS = (
    Script("benchmarks.demo", "benchmarks/out", "benchmarks/results"),
    Script("benchmarks.memory_bound", "benchmarks/out", "benchmarks/results", option="--out"),
    Script("benchmarks.fit_cost", "benchmarks/out", "benchmarks/results", option="--out"),
    Script("benchmarks.nothing_compacted", "benchmarks/out", "benchmarks/results", option="--out"),
    Script("benchmarks.neighbours", "benchmarks/out", "benchmarks/results", option="--out"),
    Script("benchmarks.soak", "benchmarks/out", "benchmarks/results", option="--out"),
    Script(
        "benchmarks.fleet",
        "benchmarks/out",
        "benchmarks/results",
        where="benchmarks.fleet.__main__",
        option="--out",
    ),
    Script("benchmarks.page_overhead", "benchmarks/out", "benchmarks/results", option="--out"),
    Script(
        "benchmarks.vs_reference", "benchmarks/out", "benchmarks/results", ("--reference", "none")
    ),
    Script(
        "benchmarks.quality",
        "benchmarks/out/quality.csv",
        "benchmarks/results/quality.csv",
        ("recall",),
        "benchmarks.quality.recall",
    ),
    Script(
        "benchmarks.quality",
        "benchmarks/out",
        "benchmarks/results",
        ("rounds",),
        "benchmarks.quality.rounds",
    ),
    Script(
        "benchmarks.quality",
        "benchmarks/out",
        "benchmarks/results",
        ("samples",),
        "benchmarks.quality.samples",
        option="--out",
    ),
    question_answering("quality"),
    question_answering("longhealth"),
    question_answering("ruler"),
    Script(
        "benchmarks.gpu_suite",
        "benchmarks/out/gpu",
        "benchmarks/results/gpu",
        where="benchmarks.gpu_suite.__main__",
        option="--out",
    ),
    Script(
        "benchmarks.recall.evaluate",
        "benchmarks/out/recall/evaluation.csv",
        "benchmarks/recall/evaluation.csv",
    ),
    Script(
        "benchmarks.recall.train",
        "benchmarks/out/recall/model",
        "benchmarks/recall/model",
        option="--model",
    ),
)


class Asked(Exception):
    """The script has asked where to write to: the path."""


@pytest.fixture(params=SCRIPTS, ids=lambda s: " ".join((s.module, *s.arguments[:1])))
def script(request, monkeypatch):
    """A script that ends as soon as it has asked where to write to."""
    script = request.param

    def ask(*arguments, **keywords):
        raise Asked(folders.result_path(*arguments, **keywords))

    where = importlib.import_module(script.where or script.module)
    monkeypatch.setattr(where, "result_path", ask)
    return script


def run(script: Script, monkeypatch, *arguments: str) -> Path:
    """The path that the script asked for, before it did anything else.

    Raises:
        SystemExit: it refused its arguments.
    """
    monkeypatch.setattr(sys, "argv", [script.module, *script.arguments, *arguments])
    if script.module == "benchmarks.quality":
        entry = importlib.import_module("benchmarks.quality.__main__").app
    else:
        main = importlib.import_module(script.where or script.module).main
        argparse = script.module.startswith(("benchmarks.gpu_suite", "benchmarks.recall"))
        entry = main if argparse else functools.partial(typer.run, main)
    with pytest.raises(Asked) as asked:
        entry()
    path: Path = asked.value.args[0]
    return path


def ignored(path: Path) -> bool:
    if not (ROOT / ".git").exists():
        pytest.skip("not in a repository")
    return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0


def test_results_go_to_a_folder_that_git_ignores(script, monkeypatch):
    path = run(script, monkeypatch)
    assert path == ROOT / script.out
    assert ignored(path / "any.md")


def test_recorded_results_go_to_the_committed_folder(script, monkeypatch):
    path = run(script, monkeypatch, "--record")
    assert path == ROOT / script.recorded
    assert not ignored(path / "any.md")


def test_a_place_that_is_named_is_not_recorded(script, monkeypatch, tmp_path, capsys):
    named = (script.option, str(tmp_path / "here"))
    assert run(script, monkeypatch, *named) == tmp_path / "here"
    with pytest.raises(SystemExit) as refusal:
        run(script, monkeypatch, *named, "--record")
    assert refusal.value.code == 2 and "--record" in capsys.readouterr().err


@pytest.mark.slow
def test_training_leaves_the_bundled_model_alone(monkeypatch, tmp_path):
    """Its checkpoint and training curve, too, go to the folder that git ignores."""
    from benchmarks.recall import train

    def bundled() -> dict[Path, int]:
        files = (ROOT / "benchmarks" / "recall").rglob("*")
        return {path: path.stat().st_mtime_ns for path in files if "__pycache__" not in path.parts}

    before = bundled()
    monkeypatch.setattr(folders, "UNRECORDED", tmp_path)
    arguments = ["--tokens", "1", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    train.main()
    written = {path.name for path in (tmp_path / "recall").iterdir()}
    assert written == {"checkpoint.pt", "model", "training.csv", "training.png"}
    assert (tmp_path / "recall" / "model" / "model.safetensors").exists()
    assert bundled() == before
