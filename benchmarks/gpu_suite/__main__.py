"""The command line of the suite; see the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks.folders import result_path, written
from benchmarks.fresh_process import environment
from benchmarks.gpu_suite.report import Report, command_line
from benchmarks.gpu_suite.stages import DRY, STAGES, Stage
from benchmarks.gpu_suite.watch import TIMED_OUT, Outcome, run_watched
from benchmarks.machine import machine_line

ROOT = Path(__file__).parents[2]

#: Under so many seconds no stage is started: it would tell nothing.
_LEAST = 10

#: Set by short.sh: when it was started, in seconds of the epoch.
STARTED = "VLLM_AM_GPU_SUITE_STARTED"

#: What the log of a run is called, the table of its stages, and the archive of their results.
LOG, TABLE, BUNDLE = "log.txt", "stages", "results.tar.gz"


def run_here(stage: Stage, folder: Path, smoke: bool, command: str) -> None:
    """Make and write the report of a stage; ``command`` is what the user typed."""
    assert stage.report is not None
    report = stage.report(smoke)
    report.write(folder, command)
    print((folder / f"{report.name}.md").read_text())
    print(written(folder, f"{report.name}.md", f"{report.name}.csv"), flush=True)


def run_stages(
    stages: list[Stage], folder: Path, smoke: bool, deadline: float, bundle: bool = False
) -> list[Stage]:
    """Run stages one after the other, whatever becomes of each; those that failed.

    The log, the table of the stages and the results so far are in ``folder`` after each of them.

    Args:
        deadline: of all of them, in the seconds of ``time.time``.
        bundle: put the results into one archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = Path(tempfile.mkdtemp()) if bundle else folder
    typed = command_line()
    rows: list[dict[str, object]] = []
    failed = []
    variables = environment(**({DRY: "1"} if smoke else {}))
    with (folder / LOG).open("w") as log:
        log.write(f"{typed}\n{machine_line()}\n")
        for stage in stages:
            limit = min(stage.limit, deadline - time.time())
            if limit < _LEAST:
                outcome = Outcome(TIMED_OUT, 0.0, "no time left\n")
            else:
                log.write(f"\n===== {stage.name}: {stage.shows}; at most {limit:.0f} s\n")
                outcome = run_watched(
                    stage.words(smoke, results.absolute(), typed),
                    limit=limit,
                    log=log,
                    cwd=ROOT,
                    environment=variables,
                )
            if outcome.status != 0:
                failed.append(stage)
            print(f"== {stage.name}: exit {outcome.status}, {outcome.seconds:.0f} s")
            print(outcome.tail, flush=True)
            rows.append(
                {
                    "stage": stage.name,
                    "shows": stage.shows,
                    "exit": outcome.status,
                    "seconds": round(outcome.seconds),
                    "limit": round(limit),
                    "expected": stage.expected,
                }
            )
            notes = [f"Exit {TIMED_OUT}: ended at its limit. `expected`: on a fresh H200 machine."]
            Report(TABLE, "Stages of the GPU suite", rows, notes).write(folder, typed, csv=False)
            if bundle:
                with tarfile.open(folder / BUNDLE, "w:gz") as archive:
                    archive.add(results, arcname="gpu")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--act", type=int, choices=[1, 2, 3], help="the stages of a short command")
    parser.add_argument("--stage", action="append", choices=[stage.name for stage in STAGES])
    parser.add_argument("--seconds", type=float, help="time for all of it; default: no end")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out", type=Path, help="folder of the results; default: benchmarks/out/gpu"
    )
    place.add_argument(
        "--record", action="store_true", help="replace the committed results instead"
    )
    parser.add_argument("--bundle", action="store_true", help="results in one archive")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument("--plot", action="store_true", help="draw the results that are there")
    # The command that the user typed, where this process runs a stage of it.
    parser.add_argument("--here", metavar="COMMAND", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = result_path(options.out, options.record, "gpu")
    if options.list:
        for stage in STAGES:
            act = f"act {stage.act}" if stage.act else ""
            print(f"{stage.name:19}{act:7}{stage.expected:5} s   {stage.shows}")
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
    stages = [
        stage
        for stage in STAGES
        if (stage.name in options.stage if options.stage else options.act in (None, stage.act))
    ]
    if options.here:
        run_here(stages[0], folder, options.smoke, options.here)
        return 0
    print(machine_line(), flush=True)
    started = float(os.environ.get(STARTED, time.time()))
    deadline = started + (options.seconds or float("inf"))
    if options.smoke and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # of the stages
    failed = run_stages(stages, folder, options.smoke, deadline, options.bundle)
    print(f"failed: {', '.join(stage.name for stage in failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
