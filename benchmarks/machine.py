"""What a result was measured with: the machine, versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.folders import BENCHMARKS, RECORDED


def machine_line() -> str:
    """GPU and driver, or CPU and cores; versions; commit. In one line."""
    device = _gpu() if torch.cuda.is_available() else _cpu()
    packages = []
    for package in ("vllm", "torch", "triton", "vllm-am"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{device}; {', '.join(packages)}; commit {commit()}"


def commit() -> str:
    """Of the working tree; from $VLLM_AM_COMMIT where the tree came without its repository.

    "-dirty" if tracked files differ from it, the recorded results themselves aside.
    """
    code = [":/", f":(exclude,top){RECORDED.relative_to(BENCHMARKS.parent)}"]
    head = _git("rev-parse", "--short", "HEAD")
    dirty = "-dirty" if head and _git("diff", "--name-only", "HEAD", "--", *code) else ""
    return os.environ.get("VLLM_AM_COMMIT") or head + dirty or "unknown"


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()


def _gpu() -> str:
    # Not through torch: a context of this process would take memory from what is measured.
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    name, _, driver = (found or ["?, ?"])[0].partition(", ")
    return f"{name}, driver {driver}"


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as lines:
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
