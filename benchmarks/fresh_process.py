"""Work in a process of its own, which leaves no engine, no settings and no memory behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import psutil

ROOT = Path(__file__).parents[1]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment for one that imports this repository, with changes.

    The root comes first on PYTHONPATH, before what is there already: on a machine without network
    vLLM itself, and the plugin's entry points, may be known from there only.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(path)}


def end_tree(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it has started; wait for it. Does nothing to one that has ended
    by itself, but to what that has left in its session, if it led one."""
    doomed = []
    with contextlib.suppress(psutil.NoSuchProcess):
        doomed = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for descendant in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    process.kill()
    process.wait()
    psutil.wait_procs(doomed, timeout=5)


def run_fresh(module: str, job: Any, environment: Mapping[str, str], timeout: float) -> Any:
    """Run a module of this repository that reads a job and prints its result on a line of its own.

    What it writes to standard error is passed on as it comes. Libraries may print more when the
    process ends (vLLM does so on a GPU): the result is the last line that is an object or a list.

    Args:
        module: as for ``python -m``.
        job: what it gets on standard input, as JSON.
        environment: all variables of the process.
        timeout: seconds.

    Returns:
        the result.

    Raises:
        RuntimeError: it failed; the message holds the end of its output.
        subprocess.TimeoutExpired: it took too long.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=dict(environment),
    )
    assert process.stdin and process.stdout and process.stderr
    said = ""

    def pass_on(errors: TextIO) -> None:
        nonlocal said
        for line in errors:
            sys.stderr.write(line)
            sys.stderr.flush()
            said = (said + line)[-6000:]

    reader = threading.Thread(target=pass_on, args=(process.stderr,), daemon=True)
    reader.start()
    expired = threading.Event()

    def end() -> None:
        expired.set()
        end_tree(process)

    timer = threading.Timer(timeout, end)
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it has died: its status says so
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        output = process.stdout.read()
        process.wait()
    finally:
        timer.cancel()
        end_tree(process)
        timer.join()  # it may still be waiting for the last of those that it has killed
    reader.join(timeout=5)
    if expired.is_set():
        raise subprocess.TimeoutExpired(module, timeout, output, said)
    lines = output.strip().splitlines()
    if process.returncode == 0:
        for line in reversed(lines):
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(result := json.loads(line), dict | list):
                    return result
    raise RuntimeError(f"{module}: exit status {process.returncode}\n{output[-2000:]}\n{said}")
