"""The command line of the suite; see the package's docstring."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.folders import result_path, written
from benchmarks.gpu_suite.report import Report, command_line
from benchmarks.machine import machine_line

ROOT = Path(__file__).parents[2]
#: Seconds that a part may take.
LIMIT = 600


@dataclass(frozen=True)
class Part:
    """One part: tests (arguments of pytest), or a benchmark that makes a report."""

    name: str
    shows: str
    tests: tuple[str, ...] = ()
    report: Callable[[bool], Report] | None = None


# Imported when they run: the list of parts must not need Triton.
def _fit(smoke: bool) -> Report:
    from benchmarks.gpu_suite import fit_speed

    return fit_speed.report(smoke)


def _attention(smoke: bool) -> Report:
    from benchmarks.gpu_suite import attention_speed

    return attention_speed.report(smoke)


def _overhead(smoke: bool) -> Report:
    from benchmarks.gpu_suite import engine_speed

    return engine_speed.overhead(smoke)


def _memory_bound(smoke: bool) -> Report:
    from benchmarks import memory_bound

    return memory_bound.report(smoke)


#: In this order: what fails first says most.
PARTS = (
    Part(
        "kernels",
        "every kernel against its reference, on the device",
        # Compilation without a GPU, and the solver on the host, are CI's.
        (
            "tests/kernels",
            "--ignore=tests/kernels/test_compile.py",
            "--ignore=tests/kernels/test_csrc.py",
        ),
    ),
    Part("engine", "identity and compaction end to end, graphs on", ("tests/gpu",)),
    Part("attention", "decode attention: bandwidth, FlashAttention", report=_attention),
    Part("fit", "time of a compaction", report=_fit),
    Part("overhead", "cost of the flag with nothing compacted", report=_overhead),
    Part("memory-bound", "gain against the size of the KV pool", report=_memory_bound),
)


def run_tests(part: Part) -> int:
    """pytest's exit status; "no tests collected" counts as a failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *part.tests]
    return subprocess.run(command, cwd=ROOT, timeout=LIMIT, check=False).returncode


def run_here(part: Part, folder: Path, smoke: bool, command: str) -> int:
    """Make and write the report of a part; ``command`` is what the user typed."""
    assert part.report is not None
    report = part.report(smoke)
    report.write(folder, command)
    print((folder / f"{report.name}.md").read_text())
    print(written(folder, f"{report.name}.md", f"{report.name}.csv"), flush=True)
    return 0


def run_apart(part: Part, arguments: list[str]) -> int:
    """A benchmark in a process of its own: a crash or a hang ends only that part."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--part", part.name]
    command += ["--here", command_line(), *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        print(f"{part.name}: over {LIMIT} s", flush=True)
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--part", action="append", choices=[p.name for p in PARTS])
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out", type=Path, help="folder of the results; default: benchmarks/out/gpu"
    )
    place.add_argument(
        "--record", action="store_true", help="replace the committed results instead"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--plot", action="store_true", help="draw the results that are there")
    # The command that the user typed, where this process runs a part of it.
    parser.add_argument("--here", metavar="COMMAND", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = result_path(options.out, options.record, "gpu")
    if options.list:
        print("\n".join(f"{part.name:14}{part.shows}" for part in PARTS))
        return 0
    if options.plot:
        from benchmarks.gpu_suite.plot import plot_results

        plots = plot_results(folder)
        print(written(folder, *(plot.name for plot in plots)) if plots else f"{folder}: no results")
        return 0
    import torch

    if not torch.cuda.is_available() and not options.smoke:
        print("no CUDA device: this suite measures one (--smoke tries the code anywhere)")
        return 2
    chosen = [part for part in PARTS if options.part is None or part.name in options.part]
    if options.here:
        return max(run_here(part, folder, options.smoke, options.here) for part in chosen)
    print(machine_line(), flush=True)
    failed = []
    passed_on = ["--out", str(folder.absolute()), *(["--smoke"] if options.smoke else [])]
    for part in chosen:
        start = time.monotonic()
        status = run_tests(part) if part.tests else run_apart(part, passed_on)
        print(f"== {part.name}: exit {status}, {time.monotonic() - start:.0f} s", flush=True)
        if status != 0:
            failed.append(part.name)
    print(f"failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
