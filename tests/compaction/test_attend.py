"""The reference attention, against dense softmax."""

import itertools
import math

import pytest
import torch

from tests.compaction.synthetic import random_problem
from vllm_am.compaction.accelerate import use_kernels
from vllm_am.compaction.attend import attend, causal_mask, merge, weigh_scores
from vllm_am.kernels.cpu_library import library


def dense(queries, keys, values, bias=None, mask=None):
    scores = queries.double() @ keys.double().mT / math.sqrt(keys.shape[-1])
    if bias is not None:
        scores = scores + bias.double().unsqueeze(-2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1) @ values.double(), torch.logsumexp(scores, -1)


@pytest.mark.parametrize("T", [1, 2, 63, 500])
@pytest.mark.parametrize("D", [60, 64, 128])
def test_matches_dense_softmax(T, D):
    keys, values, queries = random_problem(3, T, 7, D)
    bias = torch.linspace(-3, 3, 3 * T).view(3, T)
    output, lse = attend(queries, keys, values, bias)
    expected_output, expected_lse = dense(queries, keys, values, bias)
    torch.testing.assert_close(output.double(), expected_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_accumulated_in_fp32(dtype):
    keys, values, queries = random_problem(2, 300, 5, 64, dtype=dtype)
    output, lse = attend(queries, keys, values)
    assert output.dtype == lse.dtype == torch.float32
    expected, _ = dense(queries, keys, values)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64():
    keys, values, queries = random_problem(2, 30, 5, 64, dtype=torch.float64)
    output, lse = attend(queries, keys, values)
    assert output.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(output, dense(queries, keys, values)[0])


def test_scale_and_large_scores():
    keys, values, queries = random_problem(1, 20, 4, 64, dtype=torch.float64)
    output, lse = attend(queries, keys, values, scale=50.0)
    scores = queries @ keys.mT * 50.0
    assert scores.abs().max() > 1000  # would overflow without the shift
    torch.testing.assert_close(output, torch.softmax(scores, -1) @ values)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


def test_causal_mask_is_aligned_to_the_last_token():
    expected = torch.tensor([[True, True, True, False], [True, True, True, True]])
    assert torch.equal(causal_mask(2, 4), expected)
    keys, values, queries = random_problem(2, 9, 4, 64)
    mask = causal_mask(4, 9)
    output, _ = attend(queries, keys, values, mask=mask)
    expected_output, _ = dense(queries, keys, values, mask=mask)
    torch.testing.assert_close(output.double(), expected_output, rtol=1e-5, atol=1e-5)


def test_query_without_keys_gets_zero_and_minus_infinity():
    keys, values, queries = random_problem(2, 3, 4, 64)
    bias = torch.zeros(2, 3)
    bias[1] = -torch.inf
    output, lse = attend(queries, keys, values, bias)
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    assert lse[1].isneginf().all()
    assert output[0].isfinite().all() and lse[0].isfinite().all()
    output, lse = attend(queries, keys[:, :0], values[:, :0])
    assert torch.equal(output, torch.zeros(2, 4, 64)) and lse.isneginf().all()


@pytest.mark.parametrize("cuts", [(0,), (7,), (0, 0, 7), (3,), (1, 2, 6), (7, 7)])
def test_merge_of_parts_is_attention_over_the_union(cuts):
    keys, values, queries = random_problem(2, 7, 5, 64, dtype=torch.float64)
    bias = torch.linspace(-2, 2, 14, dtype=torch.float64).view(2, 7)
    edges = (0, *cuts, 7)
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    parts = [attend(queries, keys[:, s], values[:, s], bias[:, s]) for s in spans]
    output, lse = merge([part[0] for part in parts], [part[1] for part in parts])
    expected_output, expected_lse = dense(queries, keys, values, bias)
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(lse, expected_lse)


def test_merge_ignores_what_an_empty_part_holds():
    full, empty = torch.ones(1, 2, 4), torch.full((1, 2, 4), torch.nan)
    output, lse = merge([full, empty], [torch.zeros(1, 2), torch.full((1, 2), -torch.inf)])
    assert torch.equal(output, full) and torch.equal(lse, torch.zeros(1, 2))
    output, lse = merge([empty, empty], [torch.full((1, 2), -torch.inf)] * 2)
    assert torch.equal(output, torch.zeros(1, 2, 4)) and lse.isneginf().all()


def test_compacted_prefix_and_live_tail():
    """The situation the kernels are for: a biased prefix, and causal live tokens behind it."""
    keys, values, queries = random_problem(2, 12, 3, 64, dtype=torch.float64)
    bias = torch.zeros(2, 12, dtype=torch.float64)
    bias[:, :9] = torch.linspace(-3, 3, 9)
    mask = torch.cat([torch.ones(3, 9, dtype=torch.bool), causal_mask(3, 3)], dim=1)
    prefix = attend(queries, keys[:, :9], values[:, :9], bias[:, :9])
    tail = attend(queries, keys[:, 9:], values[:, 9:], mask=causal_mask(3, 3))
    output, lse = merge([prefix[0], tail[0]], [prefix[1], tail[1]])
    expected_output, expected_lse = dense(queries, keys, values, bias, mask)
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(lse, expected_lse)


compiled_too = pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])


@pytest.fixture
def way(compiled):
    """Scores are weighed in plain torch, or by the CPU's kernel."""
    if compiled and library() is None:
        pytest.skip("no compiler")
    with use_kernels(compiled):
        yield


@compiled_too
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("heads", "rows", "columns"),
    [(1, 1, 1), (2, 3, 17), (1, 64, 33), (3, 65, 128), (2, 200, 1001), (1, 0, 5), (2, 3, 0)],
)
def test_weights_of_scores(way, heads, rows, columns, with_bias):
    generator = torch.Generator().manual_seed(0)
    scores = 10 * torch.randn(heads, rows, columns, generator=generator)
    bias = torch.randn(heads, columns, generator=generator) if with_bias else None
    exact = scores.double() + (0 if bias is None else bias.double().unsqueeze(1))
    squares = torch.ones(heads, columns)
    lse = weigh_scores(scores, bias, squares)
    expected = exact.softmax(2)
    torch.testing.assert_close(scores.double(), expected, rtol=5e-6, atol=1e-30)
    torch.testing.assert_close(lse.double(), exact.logsumexp(2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares.double(), 1 + expected.square().sum(1), rtol=1e-5, atol=1e-6)


@compiled_too
def test_weights_of_rows_that_see_nothing_or_no_number(way):
    scores = torch.randn(1, 5, 40)
    scores[0, 1] = -torch.inf
    scores[0, 2, 7] = torch.nan
    scores[0, 3] = torch.nan
    scores[0, 4, 3] = torch.inf
    good = scores[0, 0].softmax(0)
    squares = torch.zeros(1, 40)
    lse = weigh_scores(scores, None, squares)
    assert lse[0, 0].isfinite() and lse[0, 1] == -torch.inf
    assert not lse[0, 2:].isfinite().any()
    torch.testing.assert_close(scores[0, 0], good)
    assert torch.all(scores[0, 1] == 0)
    hidden = torch.zeros(1, 40)
    hidden[0, 20:] = -torch.inf
    scores = torch.randn(1, 2, 40)
    expected = scores[..., :20].softmax(2)
    weigh_scores(scores, hidden)
    torch.testing.assert_close(scores[..., :20], expected)
    assert torch.all(scores[..., 20:] == 0)


@compiled_too
def test_weights_do_not_depend_on_threads_or_neighbours(way):
    scores = torch.randn(3, 150, 333)
    results = []
    before = torch.get_num_threads()
    for threads, heads in ((1, slice(None)), (2, slice(None)), (1, slice(1, 2))):
        torch.set_num_threads(threads)
        weights, squares = scores[heads].clone(), torch.zeros(len(scores[heads]), 333)
        lse = weigh_scores(weights, None, squares)
        results.append([part[-2 if len(part) == 3 else 0] for part in (weights, lse, squares)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
