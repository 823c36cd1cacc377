"""The public function: shapes, budgets, identity, repetition and failures."""

import inspect
import math
import sys
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compaction.synthetic import (
    dense_errors,
    errors_of,
    random_problem,
    stack_heads,
    synthetic_head,
)
from vllm_am.compaction import METHODS, CompactedKV, FitError, compact, evaluate_fit
from vllm_am.compaction.attend import attend
from vllm_am.compaction.methods import Method
from vllm_am.compaction.problem import Selection
from vllm_am.compaction.select_keys import top_keys
from vllm_am.compaction.statistics import attention_statistics

METHOD_NAMES = sorted(METHODS)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def check_invariants(result: CompactedKV, keys, values, key_bias=None):
    """What holds for every result, whatever was asked for."""
    heads, size = result.indices.shape
    assert result.keys.shape == (heads, size, keys.shape[2])
    assert result.values.shape == (heads, size, values.shape[2])
    assert result.bias.shape == (heads, size)
    assert result.keys.dtype == keys.dtype and result.values.dtype == values.dtype
    assert result.bias.dtype == torch.float32
    assert size == (int(result.lengths.max()) if result.ok.all() else size)
    for head in range(heads):
        length = int(result.lengths[head])
        kept = result.indices[head, :length]
        assert (kept.diff() > 0).all() and (kept >= 0).all()
        assert torch.equal(result.keys[head, :length], keys[head, kept])
        assert result.bias[head, :length].isfinite().all()
        assert (result.indices[head, length:] == -1).all()
        assert result.bias[head, length:].isneginf().all()
        assert (result.keys[head, length:] == 0).all()
        assert (result.values[head, length:] == 0).all()
        if result.ok[head]:
            assert result.values[head].isfinite().all()
            assert result.output_error[head].isfinite() and result.mass_error[head].isfinite()


def assert_same(a: CompactedKV, b: CompactedKV, head: int):
    for field in fields(CompactedKV):
        x, y = getattr(a, field.name)[head], getattr(b, field.name)[head]
        assert torch.equal(x, y), field.name


# Shapes and budgets


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize(
    ("H", "T", "N", "D", "budget"),
    [
        (1, 1, 1, 64, 1),
        (1, 2, 1, 64, 1),
        (3, 63, 37, 60, 1),
        (2, 500, 129, 128, 77),
        (4, 65, 1, 64, 10),
        (2, 100, 5, 64, 99),
        (2, 30, 400, 96, 0),
    ],
)
def test_shapes(method, H, T, N, D, budget):
    keys, values, queries = random_problem(H, T, N, D)
    result = compact(keys, values, queries, budget=budget, method=method)
    check_invariants(result, keys, values)
    assert result.lengths.tolist() == [budget] * H
    assert result.ok.all()


@pytest.mark.parametrize(
    ("ratio", "T", "slots"),
    [(0.1, 100, 10), (0.07, 100, 7), (0.101, 100, 11), (1e-9, 100, 1), (0.5, 1, 1), (1.0, 7, 7)],
)
def test_ratio_is_rounded_up(ratio, T, slots):
    keys, values, queries = random_problem(2, T, 50, 64)
    assert compact(keys, values, queries, ratio=ratio).lengths.tolist() == [slots] * 2


def test_ratio_may_be_a_factor():
    keys, values, queries = torch.randn(3, 2, 40, 8)
    assert compact(keys, values, queries, ratio="20x").lengths.tolist() == [2] * 2
    with pytest.raises(ValueError, match=r"ratio: .*such as 10x.*'20'"):
        compact(keys, values, queries, ratio="20")


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_ragged_budgets(method):
    keys, values, queries = random_problem(5, 40, 300, 64)
    key_bias = torch.linspace(-1, 1, 200).view(5, 40)
    budget = torch.tensor([0, 40, 1, 17, 39])
    arguments = dict(method=method, key_bias=key_bias)
    result = compact(keys, values, queries, budget=budget, **arguments)
    check_invariants(result, keys, values)
    assert torch.equal(result.lengths, budget)
    assert result.output_error[0] == result.mass_error[0] == 1
    # A budget of all keys is the identity for that head, in the middle of fitted ones.
    assert torch.equal(result.keys[1], keys[1]) and torch.equal(result.values[1], values[1])
    assert torch.equal(result.bias[1], key_bias[1])
    assert result.output_error[1] == result.mass_error[1] == result.kkt_residual[1] == 0
    for head in (2, 3, 4):
        alone = compact(
            keys[[head]],
            values[[head]],
            queries[[head]],
            budget=int(budget[head]),
            method=method,
            key_bias=key_bias[[head]],
        )
        n = int(budget[head])
        assert torch.equal(result.indices[head, :n], alone.indices[0])
        torch.testing.assert_close(result.bias[head, :n], alone.bias[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(result.values[head, :n], alone.values[0], rtol=1e-2, atol=1e-2)
    quality = evaluate_fit(result, keys, values, queries, key_bias=key_bias)
    torch.testing.assert_close(quality.output_error, result.output_error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quality.mass_error, result.mass_error, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHOD_NAMES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    data=st.data(),
    heads=st.integers(1, 4),
    columns=st.integers(1, 24),
    rows=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_museum_13_any_budget(method, data, heads, columns, rows, seed):
    """Also fewer queries than slots, and heads that carry padding from an earlier compaction."""
    keys, values, queries = random_problem(heads, columns, rows, 8, seed)
    sizes = st.lists(st.integers(0, columns), min_size=heads, max_size=heads)
    budget, existing = torch.tensor(data.draw(sizes)), torch.tensor(data.draw(sizes))
    key_bias = torch.zeros(heads, columns)
    key_bias[torch.arange(columns) >= existing.unsqueeze(1)] = -torch.inf
    result = compact(keys, values, queries, budget=budget, key_bias=key_bias, method=method)
    check_invariants(result, keys, values)
    assert torch.equal(result.lengths, torch.minimum(budget, existing))
    assert result.ok.all()
    assert (result.kkt_residual < 1e-5).all()
    quality = evaluate_fit(result, keys, values, queries, key_bias=key_bias)
    assert quality.output_error.isfinite().all() and quality.mass_error.isfinite().all()


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, method):
    keys, values, queries = random_problem(3, 80, 200, 64, dtype=dtype)
    result = compact(keys, values, queries, ratio=0.25, method=method)
    check_invariants(result, keys, values)
    # The errors are those of the rounded result.
    output, mass = errors_of(result, keys, values, queries)
    torch.testing.assert_close(result.output_error.double(), output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.mass_error.double(), mass, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_heads_of_a_batch_are_independent(method):
    problem = stack_heads(*(synthetic_head(seed, T=256, n=500, m=10) for seed in range(4)))
    keys, values, queries, _ = problem
    together = compact(keys, values, queries, budget=31, method=method)
    for head in range(4):
        one = slice(head, head + 1)
        alone = compact(keys[one], values[one], queries[one], budget=31, method=method)
        assert torch.equal(together.indices[head], alone.indices[0])
        torch.testing.assert_close(together.bias[head], alone.bias[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.values[head], alone.values[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_pooled_queries_of_a_group(group):
    """A KV head serves several query heads: their queries are rows of one problem, in any order."""
    keys, values, queries = random_problem(2, 60, 50 * group, 64)
    per_head = queries.view(2, group, 50, 64)
    interleaved = per_head.transpose(1, 2).reshape(2, 50 * group, 64)
    a = compact(keys, values, queries, budget=12)
    b = compact(keys, values, interleaved, budget=12)
    assert torch.equal(a.indices, b.indices)
    torch.testing.assert_close(a.bias, b.bias, rtol=1e-4, atol=1e-4)


def test_value_width_may_differ():
    keys, _, queries = random_problem(2, 50, 100, 64)
    values = torch.randn(2, 50, 24)
    check_invariants(compact(keys, values, queries, budget=9), keys, values)


def test_inputs_are_left_alone_and_need_no_layout():
    keys, values, queries = random_problem(2, 50, 100, 64)
    copies = [x.clone() for x in (keys, values, queries)]
    expected = compact(keys, values, queries, budget=9)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (keys, values, queries)]
    actual = compact(*strided, budget=9)
    assert torch.equal(actual.indices, expected.indices)
    torch.testing.assert_close(actual.values, expected.values, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(x, y) for x, y in zip((keys, values, queries), copies, strict=True))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_same_call_same_bits(method):
    keys, values, queries, _ = synthetic_head(0, T=512, n=1000)
    a, b = (compact(keys, values, queries, budget=51, method=method) for _ in range(2))
    assert_same(a, b, 0)


def test_scale_is_used():
    keys, values, queries = random_problem(1, 60, 200, 64)
    scaled = compact(keys, values, 2 * queries, budget=12, scale=0.0625)
    plain = compact(keys, values, queries, budget=12)
    assert torch.equal(scaled.indices, plain.indices)
    torch.testing.assert_close(scaled.bias, plain.bias, rtol=1e-4, atol=1e-4)
    other = compact(keys, values, queries, budget=12, scale=0.5)
    assert not torch.equal(other.bias, plain.bias)
    quality = evaluate_fit(other, keys, values, queries, scale=0.5)
    torch.testing.assert_close(quality.mass_error, other.mass_error, rtol=1e-4, atol=1e-5)


def test_heads_are_bucketed_by_their_own_budget(monkeypatch):
    """A head of 3 slots among heads of 200 is fitted with matrices of its own size."""
    module = sys.modules["vllm_am.compaction.compact"]  # the package exports a function so named
    sizes, original = [], module.fit

    def spy(method, problem, budgets, size, failures):
        result = original(method, problem, budgets, size, failures)
        sizes.append((budgets.tolist(), result.keys.shape[1]))
        return result

    monkeypatch.setattr(module, "fit", spy)
    keys, values, queries = random_problem(7, 256, 300, 16)
    budget = torch.tensor([200, 3, 0, 17, 256, 190, 22])
    result = compact(keys, values, queries, budget=budget)
    assert sizes == [([3], 3), ([17, 22], 22), ([200, 190], 200)]
    assert torch.equal(result.lengths, budget)


# Identity and repetition


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["ratio", "budget", "budgets"])
def test_a_budget_of_everything_is_the_identity(dtype, how):
    keys, values, queries = random_problem(3, 40, 20, 64, dtype=dtype)
    keys[0, 3], values[1, 4] = torch.inf, torch.nan  # nobody computes with them
    size = {"ratio": {"ratio": 1}, "budget": {"budget": 40}}.get(
        how, {"budget": torch.tensor([40, 40, 40])}
    )
    for given_queries in (queries, queries[:, :0], None):
        result = compact(keys, values, given_queries, **size)
        assert torch.equal(result.keys.view(torch.uint8), keys.view(torch.uint8))
        assert torch.equal(result.values.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(result.bias, torch.zeros(3, 40))
        assert torch.equal(result.indices, torch.arange(40).expand(3, 40))
        assert result.ok.all()
        assert (result.output_error == 0).all() and (result.mass_error == 0).all()


def test_compacting_again_to_the_same_size_is_the_identity():
    keys, values, queries, held_out = synthetic_head(0, T=256)
    first = compact(keys, values, queries, budget=31)
    again = compact(first.keys, first.values, None, budget=31, key_bias=first.bias)
    for name in ("keys", "bias", "values", "lengths"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    quality = evaluate_fit(again, first.keys, first.values, held_out, key_bias=first.bias)
    assert quality.output_error.item() == 0.0 and quality.mass_error.item() == 0.0


def test_ragged_compacted_heads_can_be_compacted_again():
    keys, values, queries = random_problem(4, 60, 300, 64)
    first = compact(keys, values, queries, budget=torch.tensor([0, 5, 20, 60]))
    again = compact(first.keys, first.values, queries, budget=first.lengths, key_bias=first.bias)
    for name in ("keys", "bias", "values", "lengths"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    half = compact(first.keys, first.values, queries, budget=10, key_bias=first.bias)
    assert half.lengths.tolist() == [0, 5, 10, 10]
    check_invariants(half, first.keys, first.values)


def test_a_second_compaction_carries_the_bias():
    keys, values, queries, held_out = synthetic_head(0, T=512)
    first = compact(keys, values, queries, budget=102)
    second = compact(first.keys, first.values, queries, budget=51, key_bias=first.bias)
    log_weight = second.bias - first.bias.gather(1, second.indices)
    assert (log_weight.abs() <= 3 + 1e-5).all()
    direct = errors_of(compact(keys, values, queries, budget=51), keys, values, held_out)
    twice = errors_of(second, keys, values, held_out)
    dropped = errors_of(replace(second, bias=log_weight), keys, values, held_out)
    assert twice[0] < 1.25 * direct[0] and twice[1] < 1.25 * direct[1]
    assert dropped[1] > 1.5 * twice[1]


def test_museum_19_ten_rounds_with_live_tokens_in_between():
    """Decoding with repeated compaction: new keys arrive unbiased behind the compacted ones."""
    all_keys, all_values, queries, held_out = synthetic_head(1, T=1024)
    size, step = 128, 64
    keys, values, bias = (
        all_keys[:, :size],
        all_values[:, :size],
        torch.zeros(1, size),
    )
    for end in range(size + step, size + 11 * step, step):
        new = slice(end - step, end)
        keys = torch.cat([keys, all_keys[:, new]], 1)
        values = torch.cat([values, all_values[:, new]], 1)
        bias = torch.cat([bias, torch.zeros(1, step)], 1)
        result = compact(keys, values, queries, budget=size, key_bias=bias)
        keys, values, bias = result.keys, result.values, result.bias
    seen_keys, seen_values = all_keys[:, :end], all_values[:, :end]
    once = compact(seen_keys, seen_values, queries, budget=size)
    output, mass = dense_errors(seen_keys, seen_values, held_out, keys, bias, values)
    once_output, once_mass = errors_of(once, seen_keys, seen_values, held_out)
    assert output < 1.5 * once_output
    assert mass < 1.5 * once_mass


def test_museum_19_ten_rounds_of_shrinking():
    keys, values, queries, held_out = synthetic_head(2, T=512)
    current = compact(keys, values, queries, budget=450)
    for _ in range(9):
        current = compact(current.keys, current.values, queries, ratio=0.8, key_bias=current.bias)
    size = int(current.lengths[0])
    assert size < 80
    output, mass = errors_of(current, keys, values, held_out)
    once = errors_of(compact(keys, values, queries, budget=size), keys, values, held_out)
    assert output < 1.5 * once[0] and mass < 1.5 * once[1]


# Failures


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"keys": torch.zeros(40, 64)}, "keys"),
        ({"keys": torch.zeros(3, 40, 64, dtype=torch.int32)}, "keys"),
        ({"keys": [[1.0]]}, "keys"),
        ({"keys": torch.zeros(3, 40, 0), "queries": torch.zeros(3, 20, 0)}, "keys"),
        ({"values": torch.zeros(3, 41, 64)}, "values"),
        ({"values": None}, "values"),
        ({"queries": torch.zeros(3, 20, 32)}, "queries"),
        ({"queries": torch.zeros(2, 20, 64)}, "queries"),
        ({"key_bias": torch.zeros(3, 39)}, "key_bias"),
        ({"key_bias": torch.zeros(3, 40, dtype=torch.int64)}, "key_bias"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"method": "best"}, "highest-attention"),
        ({"budget": None}, "ratio, budget"),
        ({"ratio": 0.5}, "ratio, budget"),
        ({"budget": None, "ratio": 0.0}, "ratio"),
        ({"budget": None, "ratio": 1.01}, "ratio"),
        ({"budget": None, "ratio": math.nan}, "ratio"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 3}, "group_size"),
        ({"candidates": 0.5}, "candidates"),
        ({"candidates": math.nan}, "candidates"),
        ({"budget": -1}, "budget"),
        ({"budget": 41}, "budget"),
        ({"budget": 4.0}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget": torch.tensor([1, 2])}, "budget"),
        ({"budget": torch.tensor([1, 2, 41])}, "budget"),
        ({"budget": torch.tensor([1.0, 2.0, 3.0])}, "budget"),
    ],
)
def test_bad_arguments_are_named(change, name):
    keys, values, queries = random_problem(3, 40, 20, 64)
    arguments = {"keys": keys, "values": values, "queries": queries, "budget": 10, **change}
    with pytest.raises(ValueError, match=name):
        compact(**arguments)


def test_evaluate_fit_refuses_mismatches():
    keys, values, queries = random_problem(3, 40, 20, 64)
    result = compact(keys, values, queries, budget=10)
    with pytest.raises(ValueError, match="queries"):
        evaluate_fit(result, keys, values, queries[:, :0])
    with pytest.raises(ValueError, match="compacted"):
        evaluate_fit(result, keys[:2], values[:2], queries[:2])


def poisoned(where, what=torch.nan):
    """Three heads with a bad number in head 1."""
    tensors = dict(zip(("keys", "values", "queries"), random_problem(3, 40, 90, 64), strict=True))
    tensors["key_bias"] = torch.zeros(3, 40)
    tensors[where][1].view(-1)[7] = what
    return tensors


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["keys", "values", "queries", "key_bias"])
def test_one_bad_head_leaves_the_others_bit_identical(where, what, method):
    clean = compact(**poisoned(where, 0.25), budget=9, method=method, strict=False)
    assert clean.ok.all()
    result = compact(**poisoned(where, what), budget=9, method=method, strict=False)
    assert result.ok.tolist() == [True, False, True]
    assert result.lengths.tolist() == [9, 0, 9]
    assert result.output_error[1].isnan() and result.mass_error[1].isnan()
    check_invariants(result, poisoned(where)["keys"], poisoned(where)["values"])
    for head in (0, 2):
        assert_same(result, clean, head)
    with pytest.raises(FitError, match="non-finite") as caught:
        compact(**poisoned(where, what), budget=9, method=method)
    assert caught.value.reason == "non-finite" and caught.value.heads == (1,)


def test_overflow_is_found_where_it_appears():
    keys, values, queries = random_problem(3, 40, 90, 64)
    clean = compact(keys, values, queries, budget=9)
    keys[1] *= 1e30  # finite, but not the scores
    queries[1] *= 1e30
    result = compact(keys, values, queries, budget=9, strict=False)
    assert result.ok.tolist() == [True, False, True]
    for head in (0, 2):
        assert_same(result, clean, head)


def test_results_beyond_the_dtype_are_failures():
    """float16 holds 65504; fitted values may be larger than any original one."""
    keys, values, queries = random_problem(2, 40, 90, 64, dtype=torch.float16)
    values[1] *= 15000
    result = compact(keys, values, queries, budget=5, strict=False)
    assert result.ok[0]
    assert bool(result.ok[1]) == bool(result.values[1].isfinite().all() and result.lengths[1] > 0)
    check_invariants(result, keys, values)


@pytest.mark.parametrize("queries", [None, torch.zeros(3, 0, 64)])
def test_no_queries(queries):
    keys, values, _ = random_problem(3, 40, 1, 64)
    budget = torch.tensor([0, 40, 10])
    with pytest.raises(FitError) as caught:
        compact(keys, values, queries, budget=budget)
    assert caught.value.reason == "no-queries" and caught.value.heads == (2,)
    result = compact(keys, values, queries, budget=budget, strict=False)
    assert result.ok.tolist() == [True, True, False]
    assert result.lengths.tolist() == [0, 40, 0]
    assert torch.equal(result.values[1], values[1])
    # Nothing to fit: no queries needed.
    assert compact(keys, values, queries, budget=torch.tensor([0, 40, 0])).ok.all()


def test_heads_without_mass():
    keys, values, queries = random_problem(2, 40, 90, 64)
    key_bias = torch.zeros(2, 40)
    key_bias[1] = -3e38  # finite, yet the scores are -inf
    queries[1], keys[1] = 1e18, -1e20
    result = compact(keys, values, queries, budget=9, key_bias=key_bias, strict=False)
    assert result.ok.tolist() == [True, False]
    with pytest.raises(FitError) as caught:
        compact(keys, values, queries, budget=9, key_bias=key_bias)
    assert caught.value.reason == "no-mass" and caught.value.heads == (1,)


def test_singular_values_fit_is_reported(monkeypatch):
    from vllm_am.compaction import fit_values

    monkeypatch.setattr(fit_values, "RIDGE_RANGE", (-1.0, -1.0))
    keys, values, queries = random_problem(2, 40, 90, 64)
    with pytest.raises(FitError) as caught:
        compact(keys, values, queries, budget=9)
    assert caught.value.reason == "singular" and caught.value.heads == (0, 1)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("content", ["zeros", "one key repeated"])
def test_museum_13_degenerate_contents_are_fine(content, method):
    keys, values, queries = random_problem(2, 40, 90, 64)
    keys = torch.zeros_like(keys) if content == "zeros" else keys[:, :1].expand(2, 40, 64)
    result = compact(keys, values, queries, budget=9, method=method)
    check_invariants(result, keys, values)
    if not METHODS[method].fits_values:
        return
    assert (result.mass_error < 1e-4).all()
    mean = values.mean(1)
    output, _ = attend(queries, result.keys, result.values, result.bias)
    torch.testing.assert_close(output, mean.unsqueeze(1).expand_as(output), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_empty_inputs(method):
    keys, values, queries = torch.zeros(2, 0, 64), torch.zeros(2, 0, 64), torch.zeros(2, 5, 64)
    for arguments in ({"ratio": 0.5}, {"budget": 0}):
        result = compact(keys, values, queries, method=method, **arguments)
        assert result.keys.shape == (2, 0, 64) and result.lengths.tolist() == [0, 0]
    result = compact(keys[:0], values[:0], queries[:0], ratio=0.5, method=method)
    assert result.keys.shape == (0, 0, 64) and result.ok.shape == (0,)


# Methods and defaults


def test_a_method_says_which_fits_apply(monkeypatch):
    """The registry is the extension point: an eviction method is a selection without fits."""

    def first_keys(problem, budgets, width):
        return Selection(top_keys(-torch.arange(40.0).expand(3, 40), budgets, width))

    for bounds in (None, (-1.0, 1.0)):
        for fits_values in (False, True):
            method = Method("first", first_keys, (), bounds, fits_values)
            monkeypatch.setitem(METHODS, "first", method)
            keys, values, queries = random_problem(3, 40, 90, 64)
            result = compact(keys, values, queries, budget=4, method="first")
            assert torch.equal(result.indices, torch.arange(4).expand(3, 4))
            assert (result.bias.abs().amax() == 0) == (bounds is None)
            assert result.bias.abs().amax() <= 1 + 1e-6
            assert torch.equal(result.values, values[:, :4]) != fits_values


def test_defaults():
    """Constants that change every result. Sources: the paper (arXiv 2602.16284), or measurement."""
    method = METHODS["highest-attention"]
    assert method.norms == ("rms",)  # paper, section 3
    assert method.log_weight_bounds == (-3.0, 3.0)  # paper's configuration of this variant
    assert method.fits_values
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(compact).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert defaults.pop("chunk_bytes") == 8 << 20  # see streaming.py
    assert defaults == {
        "ratio": None,
        "budget": None,
        "method": "highest-attention",
        "scale": None,
        "key_bias": None,
        "group_size": 1,
        "candidates": 8.0,  # our measurement, see candidates.py
        "statistics": None,
        "strict": True,
    }


def test_the_package_does_not_import_vllm():
    import subprocess

    code = "import sys, vllm_am.compaction; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_statistics_that_the_caller_has_give_the_same_result():
    keys, values, queries, _ = synthetic_head(0)
    keys, values, queries = (torch.cat([x, 0.9 * x]) for x in (keys, values, queries))
    budget = torch.tensor([30, 200])  # two buckets
    known = attention_statistics(keys, values, queries, scale=128**-0.5, norms=("rms", "max"))
    fresh = compact(keys, values, queries, budget=budget)
    given = compact(keys, values, queries, budget=budget, statistics=known)
    for name in ("indices", "bias", "values"):
        torch.testing.assert_close(getattr(given, name), getattr(fresh, name))
    lacking = attention_statistics(keys, values, queries, scale=128**-0.5, norms=())
    with pytest.raises(ValueError, match=r"statistics: without the scores.*highest-attention"):
        compact(keys, values, queries, budget=budget, statistics=lacking)


def test_large_heads_keep_their_keys_as_they_are(monkeypatch):
    """Their values and biases, too; others of the batch are fitted as ever."""
    module = sys.modules["vllm_am.compaction.compact"]  # the name is the function's
    monkeypatch.setattr(module, "LARGE_SLOTS", 40)
    monkeypatch.setattr(module, "MOST_FITTED_SLOTS", 90)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(5, 128, 16, generator=generator) for _ in range(2))
    queries = torch.randn(5, 200, 16, generator=generator)
    budget = torch.tensor([20, 64, 65, 100, 128])
    found = compact(keys, values, queries, budget=budget)
    small = compact(keys[:2], values[:2], queries[:2], budget=budget[:2])
    assert torch.equal(found.values[:2, :64], small.values)
    assert torch.equal(found.bias[:2, :64], small.bias)
    scores = attention_statistics(keys, values, queries, scale=0.25).scores["rms"]
    for head, slots in ((2, 65), (3, 100)):
        indices = found.indices[head, :slots]
        assert indices.tolist() == top_keys(scores[head, None], budget[head, None])[0].tolist()
        assert torch.equal(found.values[head, :slots], values[head, indices])
        assert not found.bias[head, :slots].any()
        assert 0 < float(found.output_error[head]) < 1
    assert found.indices[4].tolist() == list(range(128))
    carried = compact(keys, values, queries, budget=budget, key_bias=torch.zeros(5, 128))
    assert carried.bias[3, :100].any(), "of a segment that is merged, all are fitted"
