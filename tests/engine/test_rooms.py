"""A place says in which process its lines run: who may import whom, how long files are."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import vllm_am

PACKAGE = Path(vllm_am.__file__).parent
ENGINE = PACKAGE / "engine"
ROOMS = ("frontend", "scheduler", "worker")
#: The files that know the rooms: vLLM's entry point, and the names of our classes for vLLM.
DOORS = {"plugin.py", "classes.py"}
LONGEST_FILE = 450


def imports(path: Path) -> set[str]:
    """Modules and symbols that a file imports, at its top or later, with their whole names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports say less"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    pattern = re.compile(rf"vllm_am\.engine\.({'|'.join(ROOMS)})\b")
    return {match[1] for name in imports(path) if (match := pattern.match(name))}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_other(room):
    files = list((ENGINE / room).rglob("*.py"))
    assert len(files) > 4
    others = {path.name: rooms_imported(path) - {room} for path in files}
    assert not {name: found for name, found in others.items() if found}


def test_what_stands_between_the_rooms_imports_none():
    files = {path.name: path for path in ENGINE.glob("*.py")}
    knowing = {name for name, path in files.items() if rooms_imported(path)}
    assert knowing == DOORS


def test_every_room_is_known():
    """A new folder is a room, or is none and then says so here."""
    folders = {path.parent.name for path in ENGINE.rglob("*/__init__.py")} - {ENGINE.name}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("part", ["compaction", "config"])
def test_the_method_and_its_options_know_nothing_of_vllm(part):
    for path in (PACKAGE / part).rglob("*.py"):
        found = imports(path)
        assert not {n for n in found if re.match(r"vllm\b|vllm_am\.engine\b", n)}, path


def test_the_names_for_vllm_are_those_of_classes():
    """``classes.py`` names classes in strings, which no tool follows."""
    text = (ENGINE / "classes.py").read_text()
    named = re.findall(r'"vllm_am\.engine\.([\w.]+)\.(\w+)"', text)
    assert len(named) == 6
    for module, cls in named:
        source = (ENGINE / f"{module.replace('.', '/')}.py").read_text()
        assert re.search(rf"^class {cls}\(", source, re.MULTILINE), f"{module}.{cls}"


def test_no_file_is_long():
    """One subject per file."""
    kernels = Path(find_spec("vllm_am.kernels").origin).parent
    files = [*PACKAGE.rglob("*.py"), *kernels.rglob("*.py")]
    lines = {str(path): len(path.read_text().splitlines()) for path in files}
    assert not {path: count for path, count in lines.items() if count > LONGEST_FILE}
