"""Everything before an upload: build, check, install in a fresh environment, serve.

    make release

Builds the sdist and the wheel of what git has committed, checks them, installs the wheel into an
environment of its own with the engine that pyproject.toml pins, asks `vllm-am doctor`, and serves
the bundled model from there. Then it says how to tag and upload, and stops.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from benchmarks.recall.documents import make_document
from benchmarks.serving import Server

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "benchmarks" / "recall" / "model"
FLAGS = [
    *("--kv-compaction", "attention-matching"),
    *("--kv-compaction-ratio", "10x"),
    *("--kv-compaction-threshold", "1000"),
    *("--max-model-len", "4096"),
    *("--block-size", "32"),
    *("--dtype", "float32"),
    "--enforce-eager",
]


class NotReady(Exception):
    """What has to be done before a release."""


def version_to_release(project: str, changelog: str, citation: str) -> str:
    """Of pyproject.toml, if the other files say the same.

    Args:
        project: text of pyproject.toml.
        changelog: text of CHANGELOG.md.
        citation: text of CITATION.cff.

    Raises:
        NotReady: naming the file and what is to be written there.
    """
    version: str = tomllib.loads(project)["project"]["version"]
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.MULTILINE):
        raise NotReady(f"CHANGELOG.md has no section '## {version} (YYYY-MM-DD)': date it")
    if not re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE):
        raise NotReady(f"CITATION.cff: version is not {version}")
    return version


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Output of a command.

    Raises:
        NotReady: it failed.
    """
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise NotReady(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def step(message: str) -> None:
    print(f"==> {message}", flush=True)


def check_git(version: str) -> None:
    """Nothing uncommitted, and no such tag yet."""
    if run("git", "status", "--porcelain"):
        raise NotReady("the working tree has changes: commit them")
    if run("git", "tag", "--list", f"v{version}").strip():
        raise NotReady(f"tag v{version} exists: raise the version in pyproject.toml")


def build(folder: Path) -> list[Path]:
    """The sdist and the wheel, of a clone."""
    run("git", "clone", "--quiet", ROOT, folder / "clone")
    run(sys.executable, "-m", "build", "--outdir", ROOT / "dist", cwd=folder / "clone")
    found = sorted((ROOT / "dist").iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *found)
    return found


def install(folder: Path, wheel: Path) -> Path:
    """A fresh environment with the engine and the wheel; its folder of programs."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "pip>=25")
    run(python, ROOT / "scripts" / "install_engine.py", "cpu")
    run(python, "-m", "pip", "install", "-q", wheel, cwd=folder)
    return folder / "bin"


def serve(programs: Path, log: Path) -> None:
    """A document, a question, a compaction.

    Raises:
        NotReady: no compaction, or another answer.
    """
    document = make_document(0, 2000, "sparse")
    question = next(q for q in document.questions if q.kind == "recall")
    server = Server(str(MODEL), FLAGS, log, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    server.command[0] = str(programs / "vllm")
    with server:
        server.wait_until_ready()
        said = server.chat(
            [{"role": "user", "content": f"{document.text}\n\n{question.text}"}], max_tokens=64
        )
        compactions = server.metrics().total("vllm:kv_compaction_compactions_total")
    if compactions != 1 or question.value not in said.text:
        raise NotReady(f"served, with {compactions:.0f} compactions: {said.text!r}")


def main() -> None:
    """All steps; exits with what is missing."""
    try:
        texts = [(ROOT / n).read_text() for n in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff")]
        version = version_to_release(*texts)
        check_git(version)
        if list((ROOT / "dist").glob("*")):
            raise NotReady("dist/ is not empty: `make clean` first")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            step(f"building and checking {version}")
            [sdist, wheel] = sorted(build(folder), key=lambda path: path.suffix != ".gz")
            step("installing the wheel and the engine into a fresh environment")
            programs = install(folder / "environment", wheel)
            step("vllm-am doctor")
            print(run(programs / "vllm-am", "doctor", cwd=folder))
            step("serving the bundled model")
            serve(programs, folder / "server.log")
    except NotReady as reason:
        sys.exit(f"not ready: {reason}")
    step("ready; nothing is uploaded. The rest is yours:")
    print(f"    git tag -a v{version} -m v{version} && git push origin v{version}")
    print(f"    {sys.executable} -m twine upload {sdist} {wheel}")


if __name__ == "__main__":
    main()
