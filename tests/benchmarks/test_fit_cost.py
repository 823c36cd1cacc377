"""What fits take beside prompts, and what samples of the queries do to answers."""

import csv
import subprocess
import sys

import pytest

from benchmarks.fresh_process import ROOT, environment
from benchmarks.quality import samples
from vllm_am.compaction import fitting, sample_queries


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.engine
def test_fits_are_timed_beside_their_prompt(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fit_cost", "--out", tmp_path]
    command += ["--cases", "bundled:400", "--ratios", "5x"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    (row,) = rows_of(tmp_path / "fit_cost.csv")
    assert (row["prompt tokens"], row["ratio"]) == ("400", "5x")
    read, fit = float(row["read, s"]), float(row["fit, s"])
    assert read > 0 and fit > 0 and float(row["fit / read"]) == pytest.approx(fit / read)


def test_each_kind_of_sample_is_what_its_name_says():
    sizes = {}
    for name in (*samples.SIZES, samples.BY_POSITION):
        with samples.sampling(name):
            sizes[name] = [sample_queries.sample_size(8192, slots) for slots in (10, 1000)]
            by_position = fitting.sample_queries is samples._by_position
            assert by_position == (name == samples.BY_POSITION)
    assert sizes == {
        "all": [8192, 8192],
        "2,048, 4 per slot": [2048, 4000],
        "2,048, 8 per slot": [2048, 8192],
        "1,024, 4 per slot": [1024, 4000],
        "512, 2 per slot": [512, 2000],
        samples.BY_POSITION: [2048, 4000],
    }
    assert fitting.sample_queries is sample_queries.sample_queries
    assert sample_queries.sample_size(8192, 10) == 2048


@pytest.mark.slow
def test_samples_are_compared_on_the_same_documents(monkeypatch, tmp_path):
    monkeypatch.setattr(samples, "SIZES", {"all": (1 << 30, 0), "2,048, 4 per slot": (64, 4)})
    samples.main("bundled", "5x", 1, "dense", "2/1/1", 400, tmp_path, False)
    rows = rows_of(tmp_path / "quality-sample.csv")
    assert [row["queries read"] for row in rows] == [
        "all",
        "2,048, 4 per slot",
        samples.BY_POSITION,
    ]
    errors = [row["output error"] for row in rows]
    assert len(set(errors)) == 3  # each fit has read other queries
