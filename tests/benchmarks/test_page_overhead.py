"""The formula of the blocks held, and the budgets that it is measured with."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cases import PAGE_OVERHEAD, cases_of
from benchmarks.page_overhead import (
    FLOOR,
    Held,
    layout,
    read_published,
    shape_of,
    skewed_shares,
    span_blocks,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("tokens", "ratio", "block_size", "blocks"),
    [
        (16304, 0.02, 16, 21),  # 326.08 -> 327 slots
        (16384, 0.02, 32, 11),  # 327.68 -> 328 slots
        (16384, 0.02, 128, 3),
        (1600, 0.1, 16, 10),  # 160 slots: nothing to round, in decimal
        (1616, 0.1, 16, 11),
        (32, 0.001, 32, 1),
    ],
)
def test_blocks_of_a_span(tokens, ratio, block_size, blocks):
    assert span_blocks(tokens, ratio, block_size) == blocks


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("ratio", [0.1, 0.02, 0.07])
def test_a_span_falls_short_by_less_than_a_block(ratio, block_size):
    """The bound that docs/how-it-works.md gives."""
    for tokens in range(block_size, 40_000, block_size):
        held = span_blocks(tokens, ratio, block_size) * block_size
        assert ratio * tokens - 1e-6 <= held < ratio * tokens + block_size


def test_layout_of_a_sequence():
    found = layout(40_000, 40_005, 0.1, 16)
    # Behind a protected block, up to 64 tokens before the end; the rest is under the threshold.
    assert found.spans == (16384, 16384, 40_000 - 64 - 16 - 2 * 16384)
    assert found.exact_blocks == 1 + 5  # 64 + 5 tokens
    assert found.span_blocks == 103 + 103 + 45
    assert layout(20_000, 20_001, 0.1, 16).spans == (16384,), "3,600 are fewer than the threshold"
    assert layout(4096, 4097, 0.1, 16).spans == ()


def test_skewed_shares_are_like_the_published_ones():
    shares = skewed_shares()
    layers, kv_heads = shape_of(shares)
    assert {(case.layers, case.kv_heads) for case in cases_of(PAGE_OVERHEAD)} == {
        (layers, kv_heads)
    }
    assert sum(shares.values()) == pytest.approx(1)
    heads = layers * kv_heads
    assert len(shares) == heads
    means = sorted(share * heads for share in shares.values())
    assert [mean for mean in means if mean < 1.01 * FLOOR] == pytest.approx([FLOOR] * (heads // 2))
    assert means[-1] == pytest.approx(9.07, abs=0.01)
    longest = [max(shares[f"L{i}H{h}"] for h in range(kv_heads)) * heads for i in range(layers)]
    assert 14 < 50 / (sum(longest) / layers) < 16, "padded, 50x is 14x to 15x"


def test_published_layers_are_numbered_without_the_sliding_ones(tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps({"L5H0": 0.1, "L5H1": 0.2, "L11H0": 0.3, "L11H1": 0.4}))
    shares = read_published(path)
    assert shares == {"L0H0": 0.1, "L0H1": 0.2, "L1H0": 0.3, "L1H1": 0.4}
    assert shape_of(shares) == (2, 2)


def test_padding_is_to_the_longest_head_of_each_layer():
    held = Held(100, 10, (64,), 3, ((1, 5), (2, 4)))
    assert held.padded_blocks == (5 + 4) / 2


@pytest.mark.slow
@pytest.mark.engine
def test_the_benchmark_writes_a_table_and_its_plot(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.page_overhead", "--smoke", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    with (tmp_path / "page_overhead.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["asked for"] for row in rows] == ["10.0", "50.0"]
    for row in rows:
        assert row["span, blocks after"] == row["span, formula"]
        assert row["sequence, blocks after"] == row["sequence, formula"]
        # The pages of the engine's heads: as skewed as the shares.
        assert float(row["padded, blocks after"]) > 3 * float(row["span, blocks after"])
    assert (tmp_path / "page_overhead.png").stat().st_size > 1000
