"""What ``python -m build`` and ``pip install .`` make of a clean clone, and a server run from it.

The clone is a copy of the files that git tracks, as they are in the working tree: what is being
worked on is judged, and a file that nobody added to git is missing as it would be in a clone.

Nothing is fetched: the build uses this environment's setuptools, and the fresh environment holds
the wheel alone, with this environment's engine behind it.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import torch

from benchmarks.serving import Server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

FLAGS = [
    *("--kv-compaction", "attention-matching"),
    *("--kv-compaction-ratio", "0.25"),
    *("--kv-compaction-threshold", "512"),
    *("--kv-compaction-config", '{"recent_tokens": 32, "step_ms": 1000}'),
    *("--max-model-len", "2048"),
    *("--num-gpu-blocks-override", "129"),
    *("--block-size", "32"),
    *("--dtype", "float32"),
    *("--served-model-name", "tiny"),
    "--enforce-eager",
]

#: What a process sees of the package: run by the fresh environment's Python.
SIGHT = """
import importlib.metadata, json, sys, vllm, vllm_am, vllm_am.kernels
from vllm_am.kernels.native import SOURCES

plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
print(json.dumps({
    "package": vllm_am.__file__,
    "kernels": vllm_am.kernels.__file__,
    "sources": str(SOURCES),
    "engine": vllm.__file__,
    "plugins": [plugin.value for plugin in plugins if plugin.name == "vllm_am"],
    "editable": [name for name in sys.modules if name.startswith("__editable__")],
}))
"""


class Distributions(NamedTuple):
    """What ``python -m build`` makes."""

    sdist: Path
    wheel: Path


class Fresh(NamedTuple):
    """An environment that holds the wheel, and an empty folder to run it in."""

    folder: Path
    site_packages: Path
    elsewhere: Path

    def run(self, program: str, *arguments: str) -> str:
        """Output of one of its programs, which must succeed."""
        return run(str(self.folder / "bin" / program), *arguments, cwd=self.elsewhere)


def run(*command: str, cwd: Path) -> str:
    """Output of a command that must succeed; this checkout is out of its sight."""
    hidden = ("PYTHONPATH", "PYTHONHOME")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment["VLLM_AM_BUILD_CSRC"] = "0"
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def tracked_files() -> list[str]:
    """Files that git tracks here and that still exist."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # CI may check out as another user, whose repository git would refuse to read.
    git = ("git", "-c", "safe.directory=*", "ls-files", "-z")
    return [name for name in run(*git, cwd=ROOT).split("\0") if name and (ROOT / name).is_file()]


def copy_tracked(target: Path) -> Path:
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def sources(clone: Path) -> set[str]:
    """What has to be installed, by its path in the clone: all but csrc/.clang-format."""
    return {
        f"{folder}/{name}"
        for folder in ("csrc", "kernels", "vllm_am")
        for name in files(clone / folder)
        if not name.startswith(".")
    }


def installed(source: str) -> str:
    """Path in the wheel of one of the ``sources``."""
    return source if source.startswith("vllm_am/") else f"vllm_am/{source}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is built in this one."""
    return copy_tracked(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist, and the wheel, which ``build`` makes of the unpacked sdist."""
    clone = copy_tracked(tmp_path_factory.mktemp("build"))
    run(sys.executable, "-m", "build", "--no-isolation", cwd=clone)
    [sdist] = (clone / "dist").glob("*.tar.gz")
    [wheel] = (clone / "dist").glob("*.whl")
    return Distributions(sdist, wheel)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, distributions: Distributions) -> Fresh:
    """An environment with the wheel, which borrows this one's engine.

    A line in a ``.pth`` file adds a folder to the end of ``sys.path`` and does not read the
    ``.pth`` files in there, so the editable install of this checkout stays behind. It is added
    after pip has run, which must not find an older version to replace.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"))
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(*pip, "install", *options, str(distributions.wheel), cwd=folder)
    [site_packages] = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).is_relative_to(sys.prefix)]
    (site_packages / "engine.pth").write_text("\n".join(borrowed) + "\n")
    return Fresh(folder, site_packages, tmp_path_factory.mktemp("elsewhere"))


def test_sdist_holds_what_the_wheel_is_made_of(clone, distributions):
    with tarfile.open(distributions.sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE"} | sources(clone)
    assert needed - names == set()


def test_wheel_holds_every_source_and_nothing_else(clone, distributions):
    """No package forgotten; no tests, benchmarks or bytecode."""
    with zipfile.ZipFile(distributions.wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert names - metadata == {installed(source) for source in sources(clone)}
    assert {name.partition("/")[2] for name in metadata} >= {"licenses/LICENSE", "METADATA"}


def test_wheel_has_the_entry_points(distributions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(distributions.wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt")]
        found = configparser.ConfigParser()
        found.read_string(archive.read(name).decode())
    written = {group: dict(found[group]) for group in found.sections()}
    assert written == {"console_scripts": project["scripts"], **project["entry-points"]}


def test_the_index_would_take_them(distributions):
    """README renders, metadata is whole."""
    said = run(
        sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions), cwd=ROOT
    )
    assert said.count("PASSED") == 2


def test_pip_install_from_the_clone_gives_the_same(clone, tmp_path):
    """``pip install .`` makes its wheel of the clone itself, not of an sdist."""
    source, target = copy_tracked(tmp_path / "clone"), tmp_path / "installed"
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--no-compile")
    pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options)
    run(*pip, "--target", str(target), ".", cwd=source)
    assert files(target / "vllm_am") == {
        installed(name).removeprefix("vllm_am/") for name in sources(clone)
    }


def test_fresh_environment_sees_the_wheel_and_not_the_checkout(fresh):
    seen = json.loads(fresh.run("python", "-c", SIGHT).splitlines()[-1])
    package = fresh.site_packages / "vllm_am"
    assert seen["package"] == str(package / "__init__.py")
    assert seen["kernels"] == str(package / "kernels" / "__init__.py")
    assert seen["sources"] == str(package / "csrc")
    assert Path(seen["engine"]).is_relative_to(sys.prefix)
    assert len(seen["plugins"]) == 1
    assert seen["editable"] == []


def test_console_script_runs(fresh):
    assert "budgets" in fresh.run("vllm-am", "--help")


def test_the_wheel_mends_the_command_of_the_cpu_build(distributions, tmp_path):
    """As after ``pip install '.[cpu]'``: the engine is there, the distribution ``vllm`` is not."""
    site_packages = tmp_path / "site-packages"
    site_packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.match("vllm-*.dist-info") and "vllm_am" not in entry.name:
            (site_packages / entry.name).symlink_to(entry)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = ("--no-deps", "--no-index", "--no-compile", "--target", str(site_packages))
    run(*pip, "install", *options, str(distributions.wheel), cwd=tmp_path)

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site_packages)}
        return subprocess.run(
            [sys.executable, "-S", *arguments],  # -S: without this environment's own packages
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    command = ("-m", "vllm.entrypoints.cli.main", "--version")
    broken = python(*command)
    assert broken.returncode != 0
    assert "PackageNotFoundError: No package metadata was found for vllm" in broken.stderr
    for _ in range(2):  # the second time there is nothing to do
        mended = python("-c", "from vllm_am.cli import app; app()", "alias")
        assert mended.returncode == 0 and "0.32.0+cpu" in mended.stdout, mended.stderr
    works = python(*command)
    assert works.returncode == 0, works.stderr
    assert works.stdout.split() == ["0.32.0+cpu"]
    shown = run(*pip, "list", "--path", str(site_packages), cwd=tmp_path)
    assert ["vllm", "0.32.0+cpu"] in [line.split() for line in shown.splitlines()]


@pytest.fixture
def server(
    fresh: Fresh, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """``vllm serve`` of the fresh environment, with a cache of its own for what it compiles.

    The script ``vllm`` belongs to this environment's Python, so its module is run.
    """
    # PYTHONPATH could show the checkout; the others are set for engines in this process.
    for name in ("PYTHONPATH", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(fresh.elsewhere)
    serving = Server(str(tiny_model), FLAGS, tmp_path / "log", {"VLLM_CPU_KVCACHE_SPACE": "1"})
    python = str(fresh.folder / "bin" / "python")
    serving.command[:1] = [python, "-m", "vllm.entrypoints.cli.main"]
    with serving:
        serving.wait_until_ready()
        yield serving


@pytest.mark.engine
def test_server_from_the_wheel_compacts(server, tmp_path):
    """And attends on the CPU by the kernel that it compiles of csrc/ as installed."""
    before = server.metrics()
    body = {
        "model": "tiny",
        "prompt": [5 + 7 * i * i % 490 for i in range(900)],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    reply = httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] == 8
    delta = server.metrics().since(before)
    assert delta.total("vllm:kv_compaction_compactions_total") == 1
    assert delta.total("vllm:kv_compaction_failures_total") == 0
    assert delta.total("vllm:kv_compaction_blocks_freed_total") > 0

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is not None and not torch.cuda.is_available():
        compiled = list((tmp_path / "cache" / "vllm-am").glob("cpu-*.so"))
        assert len(compiled) == 1
        assert server.log_lines("attention on the CPU:") == []  # what takes the kernel's place
