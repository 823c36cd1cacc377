"""Run a command under a time limit: its output into a log as it comes, and nothing of it survives.

A stage starts engines, which start processes of their own. One that lives on would hold the GPU's
memory, and every later stage would fail for it.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.fresh_process import end_tree

#: Exit status of a command that was ended for its time, as ``timeout`` of coreutils has it.
TIMED_OUT = 124


@dataclass(frozen=True)
class Outcome:
    """What came of a command; ``tail`` is the end of its output."""

    status: int
    seconds: float
    tail: str


def run_watched(
    command: Sequence[str],
    *,
    limit: float,
    log: TextIO,
    cwd: Path,
    environment: Mapping[str, str],
    tail_lines: int = 30,
) -> Outcome:
    """Run a command to its end or its limit; then end every process that it has started.

    Args:
        limit: seconds.
        log: gets each line of its output, standard error included, after the seconds since the
            start.
        tail_lines: lines of output to return.
    """
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    tail: deque[str] = deque(maxlen=tail_lines)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(f"{time.monotonic() - begin:7.1f}  {line}")
            log.flush()
            tail.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
    finally:
        end_tree(process)
    reader.join(timeout=5)  # a process that has left the tree may hold the pipe open
    return Outcome(status, time.monotonic() - begin, "".join(tail))
