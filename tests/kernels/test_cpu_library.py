"""The compiled attention of a CPU: built once, found again, and done without where it must be."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

from vllm_am.cli import app
from vllm_am.compaction.attend_pages import PagedRow
from vllm_am.compaction.pages import PagedKV
from vllm_am.kernels import cpu_library
from vllm_am.kernels.attend_pages import PageAttention

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """A cache folder with nothing in it, and a process that has not looked yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_AM_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    cpu_library.load.cache_clear()
    yield
    cpu_library.load.cache_clear()


def build() -> cpu_library.Loaded:
    cpu_library.load.cache_clear()
    return cpu_library.load()


@needs_compiler
def test_built_once_then_used_without_a_compiler(monkeypatch):
    target = cpu_library.cached_library()
    assert build().code is not None and target.exists()
    assert str(target) in cpu_library.load().says
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert build().code is not None


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"\x7fELF and no more"], ids=["empty", "damaged"])
def test_a_library_that_cannot_be_loaded_is_built_anew(content):
    target = cpu_library.cached_library()
    target.parent.mkdir(parents=True)
    target.write_bytes(content)
    assert build().code is not None
    assert target.stat().st_size > 10_000


@needs_compiler
def test_a_folder_that_takes_nothing_is_done_without(tmp_path):
    (tmp_path / "cache").touch()  # root may write into any folder, but not into a file
    found = build()
    assert found.code is not None and "a temporary file" in found.says


@needs_compiler
def test_compiler_with_arguments(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -g0")
    assert build().code is not None


@pytest.mark.parametrize("broken", ["off", "no compiler", "an error"])
def test_plain_torch_where_nothing_can_be_compiled(broken, monkeypatch, tmp_path):
    if broken == "off":
        monkeypatch.setenv("VLLM_AM_NATIVE", "off")
    else:
        compiler = tmp_path / "compiler"
        if broken == "an error":
            compiler.write_text("#!/bin/sh\necho no AVX >&2\nexit 1\n")
            compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
    found = build()
    assert found.code is None
    said = {"off": "VLLM_AM_NATIVE=off", "no compiler": "install g++", "an error": "no AVX"}
    assert said[broken] in found.says
    kv = PagedKV.from_layers([torch.zeros(4, 2, 4, 16)])
    assert not PageAttention.takes(PagedRow(0, 1, torch.arange(1), 1, None), kv)


@needs_compiler
def test_build_command(monkeypatch, tmp_path):
    result = CliRunner().invoke(app, ["build"])
    assert result.exit_code == 0 and cpu_library.cached_library().exists()
    cpu_library.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    result = CliRunner().invoke(app, ["build"])
    assert result.exit_code == 1 and "install g++" in result.output


@needs_compiler
def test_processes_that_build_together_do_not_disturb_each_other():
    """Each compiles a file of its own; whichever comes last stays."""
    import subprocess

    code = "from vllm_am.kernels.cpu_library import load; print(load().code is not None)"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in running] == [b"True"] * 3
    assert [p.name for p in cpu_library.cached_library().parent.iterdir()] == [
        cpu_library.cached_library().name
    ]
