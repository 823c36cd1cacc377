"""The recall benchmark's rows, files and command."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, replace

import pytest
from typer.testing import CliRunner

from benchmarks import folders
from benchmarks.quality import recall
from benchmarks.quality.__main__ import app
from benchmarks.quality.recall import TensorRunner, configurations
from benchmarks.quality.results import (
    COLUMNS,
    FULL,
    Row,
    Store,
    canonical,
    label,
    table_cells,
    write_markdown,
    write_plot,
)

ROW = Row(
    backend="tensor",
    mode="question-after",
    density="sparse",
    tokens=2000,
    documents=12,
    questions="14/6/3",
    block_size=16,
    options=canonical({"queries": "repeat-prefill", "method": "omp", "budgets": "global"}),
    ratio=0.1,
    recall=0.9,
    recall_asked=100,
    restated=0.5,
    restated_asked=50,
    tally=math.nan,
    tally_asked=0,
    nll=0.123,
    memory=0.2,
    span_memory=0.1,
    output_error=0.3,
    mass_error=0.4,
    seconds=1.5,
    failures=0,
    commit="abc",
)


def test_rows_survive_the_file_and_are_found_again(tmp_path):
    store = Store(tmp_path / "rows.csv")
    store.add(ROW)
    again = Store(tmp_path / "rows.csv")
    assert again.rows[0].options == ROW.options and again.rows[0].key == ROW.key
    assert math.isnan(again.rows[0].tally)
    assert again.has(ROW.setting, ROW.options, 0.1)
    assert not again.has(ROW.setting, ROW.options, 0.2)
    assert not again.has(replace(ROW, documents=13).setting, ROW.options, 0.1)
    assert Store(tmp_path / "rows.csv", fresh=True).rows == []


def test_options_are_equal_whatever_their_order():
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    assert ROW.label == "omp · global · repeat-prefill"
    mixed = canonical({"queries": {"self-study": 0.5, "random": 0.5}, "recent_tokens": 32})
    assert label(mixed) == "0.5 random+0.5 self-study · recent_tokens=32"
    assert label("{}") == "defaults"
    assert label(canonical({"budgets": "some/where/qwen.json"})) == "qwen"


def test_table_shows_real_memory_and_leaves_out_what_was_not_measured():
    cells = dict(zip(COLUMNS, table_cells(ROW), strict=True))
    assert cells["ratio"] == "10x" and cells["memory"] == "20.0% (5.0x)"
    assert cells["recall"] == "90.0" and cells["tally"] == "–" and cells["s"] == "1.50"
    assert ROW.right == pytest.approx((90 + 25) / 150)


def test_table_and_plot_are_written(tmp_path):
    full = replace(ROW, options=FULL, ratio=1.0, memory=1.0, recall=1.0)
    rows = [full, ROW, replace(ROW, ratio=0.05, memory=0.15), replace(ROW, density="dense")]
    write_markdown(tmp_path / "t.md", rows, "a command", "a machine")
    text = (tmp_path / "t.md").read_text()
    assert text.count("## ") == 2 and "a command" in text and "t.png" in text
    assert text.index("| full |") < text.index("| 10x |") < text.index("| 20x |")
    write_plot(tmp_path / "t.png", rows)
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_configurations_are_a_product_and_what_is_said_besides(tmp_path):
    (tmp_path / "more.json").write_text('[{"method": "omp"}, {"method": "omp", "x": 1}]')
    found = configurations(
        "a,b", "uniform,global", "q", ['{"method": "omp"}', str(tmp_path / "more.json")]
    )
    assert len(found) == 4 + 2
    assert {"method": "b", "budgets": "global", "queries": "q"} in found
    assert found[-1] == {"method": "omp", "x": 1}


def _invoke(output, *arguments):
    return _run("--output", str(output), *arguments)


def _run(*arguments):
    base = "recall --documents 1 --lengths 500 --density sparse --asked 2/1/1 --ratios 5x"
    chosen = "--methods highest-attention --budgets uniform --queries context-prefill"
    return CliRunner().invoke(app, [*base.split(), *chosen.split(), *arguments])


def test_command_measures_once(tmp_path, monkeypatch):
    output = tmp_path / "rows.csv"
    result = _invoke(output)
    assert result.exit_code == 0, result.output
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["options"] == FULL for row in rows] == [True, False]
    assert 0 < float(rows[1]["memory"]) < 1 and rows[1]["recall_asked"] == "2"
    assert output.with_suffix(".md").exists() and output.with_suffix(".png").exists()

    def again(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(TensorRunner, "measure", again)
    assert _invoke(output).exit_code == 0
    assert isinstance(_invoke(output, "--fresh").exception, AssertionError)


def test_command_goes_on_with_the_rows_of_the_folder_that_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "UNRECORDED", tmp_path / "out")
    monkeypatch.setattr(folders, "RECORDED", tmp_path / "results")

    def measure(console, setting, plan, ratios, store, commit):
        store.add(replace(ROW, **asdict(setting), ratio=ratios[0]))

    monkeypatch.setattr(recall, "_measure", measure)

    def ratios(folder):
        return [row.ratio for row in Store(tmp_path / folder / "quality.csv").rows]

    assert _run("--ratios", "5x", "--record").exit_code == 0
    assert not (tmp_path / "out").exists()
    assert _run("--ratios", "10x").exit_code == 0
    assert (ratios("results"), ratios("out")) == ([0.2], [0.1])
    assert _run("--ratios", "20x", "--record").exit_code == 0
    assert (ratios("results"), ratios("out")) == ([0.2, 0.05], [0.1])


def test_command_refuses_nonsense(tmp_path):
    assert _invoke(tmp_path / "rows.csv", "--asked", "3").exit_code != 0
    assert _invoke(tmp_path / "rows.csv", "--mode", "question-never").exit_code != 0
