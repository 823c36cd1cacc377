"""Work in a process of its own, which leaves no engine, no settings and no memory behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_fresh(module: str, job: Any, environment: Mapping[str, str], timeout: float) -> Any:
    """Run a module of this repository that reads a job and prints its result on its last line.

    Args:
        module: as for ``python -m``.
        job: what it gets on standard input, as JSON.
        environment: all variables of the process.
        timeout: seconds.

    Returns:
        the last line of its output, from JSON.

    Raises:
        RuntimeError: it failed; the message holds the end of its output.
        subprocess.TimeoutExpired: it took too long.
    """
    process = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=dict(environment),
        check=False,
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode != 0 or not lines:
        raise RuntimeError(
            f"{module}: exit status {process.returncode}\n"
            f"{process.stdout[-2000:]}\n{process.stderr[-6000:]}"
        )
    return json.loads(lines[-1])
