"""The GPU suite's own code, at tiny sizes on whatever machine this is."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_suite.plot import plot_memory_bound

ROOT = Path(__file__).parents[2]


def run_suite(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if interpret and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_parts_are_listed():
    listed = run_suite("--list").stdout
    for part in ("kernels", "engine", "attention", "fit", "overhead", "memory-bound"):
        assert f"\n{part}" in f"\n{listed}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    process = run_suite()
    assert process.returncode == 2 and "no CUDA device" in process.stdout


def test_fit_part_writes_a_table(tmp_path):
    process = run_suite("--smoke", "--part", "fit", "--out", str(tmp_path))
    assert process.returncode == 0, process.stdout + process.stderr
    rows = rows_of(tmp_path / "fit.csv")
    assert {row["case"] for row in rows} == {"gemma-3-12b", "qwen3-4b"}
    assert all(0 < float(row["seconds, statistics"]) < float(row["seconds, all"]) for row in rows)
    text = (tmp_path / "fit.md").read_text()
    typed = f"`python -m benchmarks.gpu_suite --smoke --part fit --out {tmp_path}`"
    assert typed in text and "commit" in text
    assert process.stdout.count("Written to ") == 1 and "fit.md, fit.csv" in process.stdout


@pytest.mark.slow
def test_attention_part_writes_a_table_and_its_plot(tmp_path):
    process = run_suite("--smoke", "--part", "attention", "--out", str(tmp_path), interpret=True)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = rows_of(tmp_path / "attention.csv")
    assert [row["heads"] for row in rows] == ["even", "uneven"]
    assert run_suite("--plot", "--out", str(tmp_path)).returncode == 0
    assert (tmp_path / "attention.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.engine
def test_memory_bound_part_compares_both_engines(tmp_path):
    process = run_suite("--smoke", "--part", "memory-bound", "--out", str(tmp_path))
    assert process.returncode == 0, process.stdout + process.stderr
    stock, *both = rows_of(tmp_path / "memory_bound.csv")
    assert stock["engine"] == "stock" and int(stock["compactions"]) == 0
    assert [ours["threshold"] for ours in both] == ["256", "30%"]
    for ours in both:
        assert ours["engine"] == "compaction" and int(ours["compactions"]) > 0
        assert int(ours["failures"]) == 0
        ratio = float(ours["tokens/s"]) / float(stock["tokens/s"])
        assert float(ours["ours / stock, tokens/s"]) == pytest.approx(ratio)
    plot_memory_bound(tmp_path / "memory_bound.csv")
    assert (tmp_path / "memory_bound.png").stat().st_size > 1000
