"""The reference attention, against dense softmax."""

import itertools
import math

import pytest
import torch

from tests.compaction.synthetic import random_problem
from vllm_am.compaction.attend import attend, causal_mask, merge


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
