"""The command that compares rounds of compaction with one."""

from __future__ import annotations

import csv

import pytest
from typer.testing import CliRunner

from benchmarks.quality.__main__ import app
from benchmarks.quality.rounds import FULL, ONCE, ROUNDS, merge_slots, single_ratio
from vllm_am.engine.footprint import slots_for


def test_one_compaction_is_asked_for_the_memory_of_the_rounds():
    """A prompt of 2,010 tokens: 63 blocks, of which [1, 61) are compacted, and 3 are not."""
    for held in (5, 9, 40):
        slots = slots_for(60 * 32, single_ratio(2010, held))
        assert -(-slots // 32) + 3 == held


def test_the_limit_is_a_share_of_the_tokens_in_whole_blocks():
    assert (merge_slots(0.1, 2000), merge_slots(0.05, 2000)) == (192, 96)
    assert merge_slots(0.01, 500) == 32


@pytest.mark.slow
@pytest.mark.engine
def test_command_writes_its_files(tmp_path):
    arguments = ["rounds", "--quick", "--asked", "3/1/1", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with (tmp_path / "quality-rounds.csv").open(newline="") as file:
        never, once, rounds = csv.DictReader(file)
    assert [row["compacted"] for row in (never, once, rounds)] == [
        FULL,
        ONCE,
        f"{ROUNDS} 2 blocks",
    ]
    assert float(never["segments"]) == 0 and float(once["segments"]) == 1
    assert float(rounds["merges"]) >= 1 and float(rounds["segments"]) >= 5
    assert float(once["blocks"]) == float(rounds["blocks"]) < float(never["blocks"])
    assert float(never["right, %"]) == 100
    assert "quality-rounds.png" in (tmp_path / "quality-rounds.md").read_text()
    assert (tmp_path / "quality-rounds.png").stat().st_size > 10_000
