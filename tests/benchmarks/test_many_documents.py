"""The benchmark of shared prefixes runs, and its shared answers stand on few compactions."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

from tests.engine.driver import ROOT, environment_of_servers

pytestmark = [pytest.mark.slow, pytest.mark.engine]


def test_it_runs(tmp_path):
    subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.many_documents", "many", "answers", "saved"),
            *("--smoke", "--out", str(tmp_path)),
        ],
        cwd=ROOT,
        env=environment_of_servers(),
        check=True,
        timeout=500,
    )
    with (tmp_path / "many_documents.csv").open(newline="") as file:
        stock, shared, marked = csv.DictReader(file)
    # All four questions come at once: a document that the query pool has no room for stays exact.
    assert int(stock["compactions"]) == 0 and 1 <= int(shared["compactions"]) <= 2
    assert 1 <= int(marked["compactions"]) <= 2
    assert (tmp_path / "many_documents.png").stat().st_size > 10_000
    with (tmp_path / "many_documents_answers.csv").open(newline="") as file:
        full, own, others = csv.DictReader(file)
    assert int(own["compactions"]) > 1 and int(others["compactions"]) == 1
    assert float(full["right"]) == 1.0 and float(others["right"]) >= 0.75
    with (tmp_path / "many_documents_saved.csv").open(newline="") as file:
        read, loaded = csv.DictReader(file)
    assert float(loaded["prompt tokens computed"]) < float(read["prompt tokens computed"]) / 4
    assert float(loaded["right"]) == 1.0
