"""Every command that README and the documentation show is one that would run."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from tests.docs.pages import ROOT, blocks, commands
from vllm_am.cli import app
from vllm_am.config import RequestOverrides


def check_vllm(words: list[str], parser) -> None:
    assert words[0] == "serve"
    [help_of] = [w.partition("=")[2] for w in words if w.startswith("--help=")] or [None]
    if help_of:
        assert f"--{help_of}" in parser._option_string_actions
        return
    # `…` and `{model,…}` stand for more.
    parser.parse_args([word for word in words[1:] if word != "…"])


def check_vllm_am(words: list[str], _) -> None:
    """To the last option; nothing is run."""
    command = typer.main.get_command(app)
    if words == ["--version"]:
        return
    name, *rest = words
    if rest == ["…"]:
        rest = ["--help"]
    sub = command.get_command(None, name)
    assert sub is not None, name
    if rest:  # a bare name stands for the command
        with sub.make_context(name, rest):
            pass


def check_make(words: list[str], _) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[0] in targets


def check_python(words: list[str], _) -> None:
    assert words[0] == "-m" and find_spec(words[1]), words


def check_pip(words: list[str], _) -> None:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    what = words[1]
    assert what == "." or what.strip(".[]") in extras


def check_file(words: list[str], _) -> None:
    assert (ROOT / words[words.index("-f") + 1]).is_file()


CHECKS: dict[str, Callable] = {
    "vllm": check_vllm,
    "vllm-am": check_vllm_am,
    "make": check_make,
    ".venv/bin/python": check_python,
    "pip": check_pip,
    "docker": check_file,
    "kubectl": check_file,
    "source": lambda words, _: None,
}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command(words, serve_parser, tmp_path, monkeypatch):
    Path(tmp_path, "contract.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    CHECKS[words[0]](words[1:], serve_parser)


def test_there_are_commands_to_check():
    assert len(commands()) > 20


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: block.page.stem)
def test_fields_of_requests(block):
    fields = json.loads(block.text)["vllm_xargs"]
    assert fields and set(fields) <= set(RequestOverrides.FIELDS)


def test_scripts_in_pages_come_from_examples_that_are_run():
    """Bash and Python stand in pages as snippets of ``examples/``; README's is run by its tests."""
    own = [block.page.name for block in blocks("bash", "python")]
    assert own == ["README.md"]
