"""A short life of a server with two API servers under everything that clients do."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

from tests.engine.driver import ROOT, environment_of_servers

pytestmark = [pytest.mark.slow, pytest.mark.engine]


def test_nothing_goes_wrong(tmp_path):
    command = ("--seconds", "30", "--api-servers", "2", "--out", str(tmp_path))
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *command],
        cwd=ROOT,
        env=environment_of_servers(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    with (tmp_path / "soak.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert int(row["faults"]) == 0 and row["API servers"] == "2"
    for name in ("answered", "bystanders", "refused", "given up", "compactions"):
        assert int(row[name]) >= 5, (name, row)
