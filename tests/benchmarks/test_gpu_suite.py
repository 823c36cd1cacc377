"""The GPU suite's own code, at tiny sizes on whatever machine this is."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import memory_bound
from benchmarks.fresh_process import environment, run_fresh
from benchmarks.gpu_suite.engine_run import EngineResult
from benchmarks.gpu_suite.plot import plot_memory_bound
from benchmarks.gpu_suite.report import Report
from benchmarks.gpu_suite.stages import STAGES, Stage
from benchmarks.gpu_suite.watch import TIMED_OUT, run_watched

ROOT = Path(__file__).parents[2]


def run_suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_stages_are_listed():
    listed = run_suite("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [stage.name for stage in STAGES]


@pytest.mark.parametrize(("act", "seconds"), [(1, 540), (2, 170), (3, 240)])
def test_a_short_command_fits_its_time(act, seconds):
    """With what it takes to unpack vLLM."""
    expected = [stage.expected for stage in STAGES if stage.act == act]
    assert sum(expected) + 30 <= seconds
    assert all(stage.expected < stage.limit for stage in STAGES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    process = run_suite()
    assert process.returncode == 2 and "no CUDA device" in process.stdout


@pytest.mark.slow
@pytest.mark.engine
def test_what_the_flag_costs_is_measured_beside_stock(tmp_path):
    command = [sys.executable, "-m", "benchmarks.nothing_compacted", "--smoke", "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    stock, ours = rows_of(tmp_path / "nothing_compacted.csv")
    assert [stock["engine"], ours["engine"]] == ["stock", "compaction"]
    assert ours["compactions"] == "0" and ours["tokens/s"] != stock["tokens/s"]


def test_memory_bound_compares_each_threshold_with_stock(monkeypatch, tmp_path):
    """Of engines that say what they are asked; real ones are in the dry run below."""
    asked = []

    def run_engine(case):
        asked.append(case)
        speed = 100.0 if case.kv_compaction is None else 100.0 * (1 + len(asked))
        return EngineResult(1.0, speed, 2 * len(asked), 0, len(asked) - 1, 0, 9, 0, 0.0)

    monkeypatch.setattr(memory_bound, "run_engine", run_engine)
    memory_bound.report(smoke=True).write(tmp_path)
    stock, *both = rows_of(tmp_path / "memory_bound.csv")
    assert [case.kv_compaction and case.kv_compaction["threshold"] for case in asked] == [
        *(None, 256, "30%")
    ]
    assert stock["engine"] == "stock" and stock["ours / stock, tokens/s"] == ""
    assert [ours["threshold"] for ours in both] == ["256", "30%"]
    assert [float(ours["ours / stock, tokens/s"]) for ours in both] == [3, 4]
    assert [float(ours["ours / stock, at once"]) for ours in both] == [2, 3]
    plot_memory_bound(tmp_path / "memory_bound.csv")
    assert (tmp_path / "memory_bound.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("act", ["1", "2", "3"])
def test_dry_run_of_the_short_script(act, tmp_path):
    """All of it but the device: every stage's command runs, on tiny sizes, in the script's way."""
    process = subprocess.run(
        [ROOT / "benchmarks/gpu_suite/short.sh", "--act", act, "--seconds", "600", "--smoke"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert "failed: none" in process.stdout
    # The machine returns eight files and the end of the output.
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.txt", "results.tar.gz", "stages.md"]
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    tables = list((tmp_path / "gpu").glob("*.csv"))
    stages = [stage for stage in STAGES if stage.act == int(act)]
    assert len(tables) == sum(stage.report is not None for stage in stages) > 0
    table = (tmp_path / "out" / "stages.md").read_text()
    log = (tmp_path / "out" / "log.txt").read_text()
    for stage in stages:
        assert f"| {stage.name} |" in table and f"===== {stage.name}:" in log
        if stage.smoke and "pytest" in stage.smoke:  # skipped tests would show nothing
            part = log.split(f"\n===== {stage.name}: ")[1].split("\n===== ")[0]
            assert " PASSED" in part and "SKIPPED" not in part and "skipped" not in part
    if act == "1":
        exact, compacted = rows_of(tmp_path / "gpu" / "context.csv")
        assert int(compacted["compactions"]) > 0 and int(compacted["failures"]) == 0
        assert float(exact["first token s"]) > 0
    if act == "2":
        stock, ours = rows_of(tmp_path / "gpu" / "memory_bound.csv")
        assert stock["engine"] == "stock" and int(stock["compactions"]) == 0
        assert ours["engine"] == "compaction" and int(ours["compactions"]) > 0
        assert int(ours["failures"]) == 0
    if act == "3":
        check_tables(tmp_path / "gpu")


def check_tables(folder: Path) -> None:
    """What the third command's tables hold, and that they can be drawn."""
    rows = rows_of(folder / "fit.csv")
    assert {row["case"] for row in rows} == {"gemma-3-12b", "qwen3-4b"}
    assert all(0 < float(row["seconds, statistics"]) < float(row["seconds, all"]) for row in rows)
    text = (folder / "fit.md").read_text()
    assert "`python -m benchmarks.gpu_suite --act 3 --seconds 600 --smoke" in text
    assert "commit" in text
    rows = rows_of(folder / "attention.csv")
    assert [row["slots per head"] for row in rows] == ["0", "96", "96"]
    assert run_suite("--plot", "--out", str(folder)).returncode == 0
    assert (folder / "attention.png").stat().st_size > 1000


def sleeper(tmp_path: Path) -> list[str]:
    """A command that says something, starts another process, and hangs."""
    program = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"],
                         start_new_session=True)
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("it hangs", flush=True)
time.sleep(100)
"""
    return [sys.executable, "-c", program]


def has_ended(pid: int) -> bool:
    """Nothing of a process runs; nobody may have asked for its status yet (a zombie)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.slow
def test_a_stage_that_hangs_ends_with_all_that_it_started(tmp_path):
    log = io.StringIO()
    outcome = run_watched(
        sleeper(tmp_path), limit=3, log=log, cwd=ROOT, environment=dict(os.environ)
    )
    assert outcome.status == TIMED_OUT and 3 <= outcome.seconds < 10
    assert outcome.tail == "it hangs\n" and log.getvalue().endswith("it hangs\n")
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_a_failure_hides_nothing_behind_it(tmp_path, monkeypatch):
    """Nor does a stage for which there is no time left; the table says what became of each."""
    from benchmarks.gpu_suite import __main__ as suite

    def stage(name: str, program: str, limit: int = 60) -> Stage:
        return Stage(name, "", limit, 1, 1, (sys.executable, "-c", program))

    stages = [
        stage("dies", "import os; os.abort()"),
        stage("raises", "raise RuntimeError('what it was')"),
        stage("works", "print('fine')"),
        stage("late", "", limit=5),
    ]
    monkeypatch.setattr(suite, "command_line", lambda: "python -m benchmarks.gpu_suite")
    failed = suite.run_stages(stages, tmp_path, smoke=False, deadline=time.time() + 300)
    assert [stage.name for stage in failed] == ["dies", "raises", "late"]
    assert "what it was" in (tmp_path / "log.txt").read_text()
    rows = [line for line in (tmp_path / "stages.md").read_text().splitlines() if line[:2] == "| "]
    assert [row.split(" | ")[2] for row in rows[1:]] == ["-6", "1", "0", str(TIMED_OUT)]


def test_rows_are_written_as_they_come(tmp_path):
    def rows():
        yield {"a": 1}
        assert rows_of(tmp_path / "table.csv") == [{"a": "1"}]
        yield {"a": 2, "b": 3}
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="gone"):
        Report("table", "A table", rows(), ["a note"]).write(tmp_path, "command")
    assert rows_of(tmp_path / "table.csv") == [{"a": "1", "b": ""}, {"a": "2", "b": "3"}]
    text = (tmp_path / "table.md").read_text()
    assert "| 2 | 3 |" in text and "a note" in text


def test_a_fresh_process_knows_what_only_pythonpath_knows(tmp_path, monkeypatch):
    """As vLLM on a machine without network, where it is unpacked into a folder."""
    (tmp_path / "only_there.py").write_text("NAME = 'found'\n")
    (tmp_path / "job_of_a_test.py").write_text(
        "import json, sys, only_there, vllm_am\n"
        "print(json.dumps([only_there.NAME, json.load(sys.stdin), vllm_am.__file__]))\n"
        "print('7\\n[rank0] what a library has to say at the end')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = run_fresh("job_of_a_test", 7, environment(A="b"), timeout=60)
    assert found == ["found", 7, str(ROOT / "vllm_am" / "__init__.py")]


@pytest.mark.slow
def test_a_fresh_process_that_hangs_ends_with_all_that_it_started(tmp_path, monkeypatch):
    (tmp_path / "job_that_hangs.py").write_text(sleeper(tmp_path)[2])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(subprocess.TimeoutExpired):
        run_fresh("job_that_hangs", None, environment(), timeout=3)
    assert has_ended(int((tmp_path / "pid").read_text()))
