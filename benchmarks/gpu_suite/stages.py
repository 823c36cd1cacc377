"""The stages of the suite, in the order of what they tell, and the time that each may take.

``expected`` is what a stage takes on a fresh machine with an H200 and 16 cores, as far as it has
been seen there (``benchmarks/results/gpu/README.md``). What takes the time is starting: importing
vLLM takes 18 s in a process, a small model's engine 20 to 50 s more if nothing is in a cache, that
of Qwen3-4B 50 s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_suite.report import Report

#: Set in a dry run, for the tests that need a device otherwise.
DRY = "VLLM_AM_GPU_DRY_RUN"

#: Kernel tests compile most of the time.
_PROCESSES = "12"
_PYTEST = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short")


@dataclass(frozen=True)
class Stage:
    """A command, or a benchmark that makes a report.

    Attributes:
        name: on the command line, and of its results.
        shows: in one line.
        limit: seconds that it may take.
        expected: seconds that it takes on a fresh machine.
        act: the command of ``short.sh`` that runs it; 0: neither.
        command: full size, on a device.
        smoke: the same code anywhere, on tiny sizes.
        report: makes the rows, tiny ones if True; instead of the two commands.
    """

    name: str
    shows: str
    limit: int
    expected: int
    act: int
    command: Sequence[str] = ()
    smoke: Sequence[str] = ()
    report: Callable[[bool], Report] | None = None

    def words(self, smoke: bool, folder: Path, typed: str) -> list[str]:
        """The command to run; ``typed`` is what the user typed, for the report."""
        if self.report is None:
            return list(self.smoke if smoke else self.command)
        here = [sys.executable, "-m", "benchmarks.gpu_suite", "--stage", self.name]
        return [*here, "--here", typed, "--out", str(folder), *(["--smoke"] if smoke else [])]


# Imported when they run: the list must not need Triton.
def _fit(smoke: bool) -> Report:
    from benchmarks.gpu_suite import fit_speed

    return fit_speed.report(smoke)


def _attention(smoke: bool) -> Report:
    from benchmarks.gpu_suite import attention_speed

    return attention_speed.report(smoke)


def _solver(smoke: bool) -> Report:
    from benchmarks.gpu_suite import solver_speed

    return solver_speed.report(smoke)


def _context(smoke: bool) -> Report:
    from benchmarks.gpu_suite import context_speed

    return context_speed.report(smoke)


def _overhead(smoke: bool) -> Report:
    from benchmarks.gpu_suite import engine_speed

    return engine_speed.overhead(smoke)


def _pair(smoke: bool) -> Report:
    from benchmarks import memory_bound

    return memory_bound.pair(smoke)


def _memory_bound(smoke: bool) -> Report:
    from benchmarks import memory_bound

    return memory_bound.report(smoke)


STAGES = (
    Stage(
        "alive",
        "does it run at all: versions, libraries, every kernel once",
        limit=75,
        expected=37,
        act=1,
        command=(sys.executable, "-m", "benchmarks.gpu_suite.alive"),
        smoke=(sys.executable, "-m", "benchmarks.gpu_suite.alive", "--smoke"),
    ),
    Stage(
        "kernels",
        "every kernel against its reference",
        limit=120,
        expected=60,
        act=1,
        # Compilation without a GPU, and the solver on the host, are CI's.
        command=(
            *_PYTEST,
            *("-n", _PROCESSES, "--maxfail=40", "tests/kernels"),
            *("--ignore=tests/kernels/test_compile.py", "--ignore=tests/kernels/test_csrc.py"),
        ),
        smoke=(*_PYTEST, "--maxfail=40", "tests/kernels/test_compact.py"),
    ),
    Stage(
        "engine",
        "identity and a real compaction end to end: graphs on, model runner V2",
        limit=330,
        expected=265,
        act=1,
        command=(
            *_PYTEST,
            *("-s", "--maxfail=3", "tests/gpu", "-k"),
            "(identity and v2-graphs) or (quarter_frees and v2)",
        ),
        smoke=(*_PYTEST, "--maxfail=3", "tests/gpu", "-k", "identity and v2-graphs"),
    ),
    Stage(
        "attention",
        "decode attention: bandwidth, FlashAttention",
        limit=70,
        expected=25,
        act=3,
        report=_attention,
    ),
    Stage("fit", "time of a compaction's stages", limit=90, expected=47, act=3, report=_fit),
    Stage(
        "solver",
        "the box solver, by thread blocks per head",
        limit=60,
        expected=30,
        act=3,
        report=_solver,
    ),
    Stage(
        "context",
        "a context of 32k tokens in an engine: prefill, compaction, decode",
        limit=160,
        expected=95,
        act=1,
        report=_context,
    ),
    Stage(
        "overhead",
        "cost of the flag with nothing compacted",
        limit=150,
        expected=90,
        act=3,
        report=_overhead,
    ),
    Stage(
        "memory-bound-pair",
        "gain where the KV pool is small: one pair of engines",
        limit=165,
        expected=130,
        act=2,
        report=_pair,
    ),
    Stage(
        "engine-all",
        "all end-to-end tests",
        limit=900,
        expected=420,
        act=0,
        command=(*_PYTEST, "--maxfail=40", "tests/gpu"),
        smoke=(*_PYTEST, "--collect-only", "tests/gpu"),
    ),
    Stage(
        "memory-bound",
        "gain against the size of the KV pool",
        limit=3600,
        expected=1500,
        act=0,
        report=_memory_bound,
    ),
)
