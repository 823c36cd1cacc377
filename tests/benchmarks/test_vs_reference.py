"""The comparison with the paper's code, on a stand-in for its checkout, and the case registry."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from benchmarks import vs_reference
from benchmarks.cases import CASES, PAGE_OVERHEAD, VS_REFERENCE, cases_of, find_case
from benchmarks.vs_reference import COUNTERPARTS, Heads, Reference
from tests.compaction.synthetic import dense_errors, synthetic_head
from vllm_am.compaction import METHODS, compact

ALGORITHMS = '''
class FirstKeys:
    """Keeps the first t keys as they are."""

    def __init__(self, boost):
        self.boost = boost

    def compute_compacted_cache(self, K, V, queries, t, attention_bias=None):
        print("noise that must not reach the terminal")
        return K[:t], K.new_full((t,), self.boost), V[:t], list(range(t))


ALGORITHM_REGISTRY = {"first": FirstKeys}
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A folder laid out like the paper's code, with one simple algorithm."""
    algorithms = tmp_path / "compaction" / "algorithms"
    configurations = tmp_path / "evaluation" / "configs" / "algorithms"
    algorithms.mkdir(parents=True)
    configurations.mkdir(parents=True)
    (algorithms / "__init__.py").write_text(ALGORITHMS)
    entries = {c.configuration: {"algorithm": "first", "boost": 0.5} for c in COUNTERPARTS.values()}
    (configurations / "best.py").write_text(f"config = {entries!r}\n")
    yield tmp_path
    for name in ("compaction", "compaction.algorithms"):
        sys.modules.pop(name, None)


def test_anything_but_a_checkout_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="git clone"):
        Reference(tmp_path)


def test_both_sides_are_judged_on_the_same_held_out_queries(checkout, capsys):
    heads = Heads(*synthetic_head(0, T=256, n=500, m=50), group_size=1)
    case = find_case("synthetic-small")
    (cell,) = vs_reference.make_cells([case], [0.125], [1], ["highest-attention"])
    (row,) = vs_reference.measure(cell, Reference(checkout), heads, repeats=2)
    assert (row.slots, row.repeats, row.counterpart) == (32, 2, "AM-HighestAttnKeys")
    ours = compact(heads.keys, heads.values, heads.queries, budget=32)
    kept = {
        "": (ours.keys, ours.bias, ours.values),
        "reference_": (heads.keys[:, :32], torch.full((1, 32), 0.5), heads.values[:, :32]),
    }
    for prefix, (keys, bias, values) in kept.items():
        output, mass = dense_errors(heads.keys, heads.values, heads.held_out, keys, bias, values)
        assert getattr(row, f"{prefix}output_error") == pytest.approx(output.item(), rel=1e-6)
        assert getattr(row, f"{prefix}mass_error") == pytest.approx(mass.item(), rel=1e-6)
    assert row.seconds > 0 and row.reference_seconds > 0
    assert "noise" not in capsys.readouterr().out


def test_one_command_writes_table_plot_and_numbers(checkout, tmp_path, capsys):
    output = tmp_path / "results"
    vs_reference.main(
        reference=checkout,
        methods="highest-attention,omp-fast",
        ratios="10x",
        cases="synthetic-small",
        heads=2,
        threads="1",
        repeats=1,
        dtype="bfloat16",
        quick=True,
        output=output,
    )
    with (output / "vs_reference.csv").open() as file:
        comments = [next(file), next(file)]
        rows = list(csv.DictReader(file))
    assert all(line.startswith("# ") for line in comments) and "commit" in comments[1]
    assert [row["method"] for row in rows] == ["highest-attention", "omp-fast"]
    assert {row["slots"] for row in rows} == {"103"}
    assert all(float(row["output_error"]) < float(row["reference_output_error"]) for row in rows)
    table = (output / "vs_reference.md").read_text()
    assert "| 10x (103) | omp-fast | AM-OMP-fast |" in table and "bfloat16" in table
    assert (output / "vs_reference.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (vs_reference.parse_cases, "qwen3-4b"),
        (vs_reference.parse_methods, "best"),
        (vs_reference.parse_ratios, "0x"),
        (vs_reference.parse_threads, "0"),
        (vs_reference.parse_threads, "many"),
    ],
)
def test_bad_options_are_named(parse, text):
    with pytest.raises(typer.BadParameter, match="--"):
        parse(text)


def test_recall_heads_are_what_the_model_attends_with(monkeypatch):
    used = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        used.append((query[0], key[0], value[0]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    case = replace(find_case("recall"), tokens=600, queries=400)
    heads = vs_reference.recall_heads(case)
    span = heads.keys.shape[1]
    assert abs(span - case.tokens) < 20
    assert heads.queries.shape == (case.heads, case.queries, case.head_dim)
    for head in range(case.heads):
        layer, kv_head = divmod(head, case.kv_heads)
        query, key, value = used[layer]
        group = query[kv_head * case.group_size : (kv_head + 1) * case.group_size]
        repeated = kv_head * case.group_size
        torch.testing.assert_close(heads.keys[head], key[repeated, :span])
        torch.testing.assert_close(heads.values[head], value[repeated, :span])
        # Of every query head as many reference queries: the first token's, ..., the last one's.
        runs = heads.queries[head].unflatten(0, (case.group_size, -1))
        torch.testing.assert_close(runs[:, 0], group[:, 0])
        torch.testing.assert_close(runs[:, -1], group[:, span - 1])
        # All that comes behind the document is held out.
        torch.testing.assert_close(heads.held_out[head], group[:, span:].flatten(0, 1))


def test_the_registry_is_consistent():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert case.tokens_per_fit * case.segments >= case.tokens
        assert all(0 < ratio < 1 for ratio in case.ratios)
        # Fewer queries than slots is a fit that means nothing, where there is a fit.
        fits = case.script != PAGE_OVERHEAD
        assert not fits or case.queries >= 3 * max(case.ratios) * case.tokens_per_fit
        assert find_case(case.name) is case
    assert {c.name for c in cases_of(VS_REFERENCE)} == {"synthetic", "synthetic-small", "recall"}
    with pytest.raises(KeyError, match="gemma-3-12b"):
        find_case("none")


def test_counterparts_exist_on_our_side():
    assert set(COUNTERPARTS) <= set(METHODS)
