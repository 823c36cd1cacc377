"""The output fit, against an independent least-squares solver."""

import math

import pytest
import torch

from tests.compaction.synthetic import random_problem, synthetic_head
from vllm_am.compaction import fit_values as fit_values_module
from vllm_am.compaction.fit_values import fit_values, ridge_for, solve_values


def output_problem(H=3, T=80, N=600, D=64, t=20):
    keys, values, queries = random_problem(H, T, N, D)
    output = torch.softmax(queries @ keys.mT / math.sqrt(D), 2) @ values
    bias = torch.linspace(-2, 2, H * t).view(H, t)
    return keys[:, :t].contiguous(), bias, values[:, :t].contiguous(), queries, output


def weighted_lstsq(keys, bias, queries, output):
    scores = queries.double() @ keys.double().T / math.sqrt(keys.shape[1]) + bias.double()
    root = output.double().norm(dim=1, keepdim=True) ** -0.25
    return torch.linalg.lstsq(torch.softmax(scores, 1) * root, output.double() * root).solution


def test_matches_weighted_least_squares():
    keys, bias, prior, queries, output = output_problem()
    values, singular = fit_values(keys, bias, prior, queries, output, scale=0.125)
    assert not singular.any()
    for head in range(3):
        expected = weighted_lstsq(keys[head], bias[head], queries[head], output[head])
        torch.testing.assert_close(values[head], expected, rtol=2e-3, atol=2e-3)


def test_padding_keeps_its_prior_and_touches_nothing():
    keys, bias, prior, queries, output = output_problem()
    bias[0, 5:], bias[1] = -torch.inf, -torch.inf
    values, singular = fit_values(keys, bias, prior, queries, output, scale=0.125)
    assert not singular.any()
    alone, _ = fit_values(
        keys[:1, :5], bias[:1, :5], prior[:1, :5], queries[:1], output[:1], scale=0.125
    )
    torch.testing.assert_close(values[:1, :5], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(values[0, 5:], prior[0, 5:].double())
    assert torch.equal(values[1], prior[1].double())


def test_a_singular_head_is_marked_and_leaves_the_others_alone():
    gram = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    gram[1] = 1.0  # rank 1
    gram[1, 0, 1] = gram[1, 1, 0] = 2.0  # and indefinite
    rhs = torch.ones(3, 4, 2, dtype=torch.float64)
    solution, singular = solve_values(gram, rhs, torch.zeros_like(rhs), 1e-6)
    assert singular.tolist() == [False, True, False]
    assert torch.equal(solution[1], torch.zeros(4, 2).double())
    expected, _ = solve_values(gram[:1], rhs[:1], torch.zeros_like(rhs[:1]), 1e-6)
    assert torch.equal(solution[[0]], expected) and torch.equal(solution[[2]], expected)


def test_duplicate_keys_are_regularised_towards_their_values():
    keys, bias, prior, queries, output = output_problem()
    keys[:, 1], bias[:, 1] = keys[:, 0], bias[:, 0]
    values, singular = fit_values(keys, bias, prior, queries, output, scale=0.125)
    assert not singular.any() and values.isfinite().all()
    # Only the sum of the pair is determined; the difference stays the original one.
    difference = values[:, 0] - values[:, 1]
    expected = (prior[:, 0] - prior[:, 1]).double()
    torch.testing.assert_close(difference, expected, rtol=1e-2, atol=1e-2)


def test_outputs_that_are_all_zero():
    keys, bias, prior, queries, output = output_problem()
    values, singular = fit_values(
        keys, bias, torch.zeros_like(prior), queries, torch.zeros_like(output), scale=0.125
    )
    assert torch.equal(values, torch.zeros_like(values)) and not singular.any()


@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 1 << 30])
def test_block_size_does_not_matter(chunk_bytes, monkeypatch):
    monkeypatch.setattr("vllm_am.compaction.streaming._GRAM_BYTES", {"cpu": 0})
    problem = output_problem()
    values, _ = fit_values(*problem, scale=0.125, chunk_bytes=chunk_bytes)
    expected, _ = fit_values(*problem, scale=0.125)
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-3)


def test_ridge_follows_the_number_of_queries_per_slot():
    ridge = ridge_for(1000, torch.tensor([0, 10, 100, 250, 500, 1000, 4000]))
    expected = [1e-6, 1e-6, 1e-6, 1e-5, 6.4e-4, 4.096e-2, 1e-1]
    torch.testing.assert_close(ridge, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("n", [51, 102, 128, 204])
def test_no_double_descent(n):
    """With as many queries as slots, plain least squares is off by a factor on held-out ones."""
    keys, values, queries, held_out = synthetic_head(0)
    t, scale = 102, 128**-0.5
    kept, prior, few = keys[:, ::10][:, :t], values[:, ::10][:, :t], queries[:, :n]

    def held_out_error(fitted):
        expected = torch.softmax(held_out @ keys.mT * scale, 2) @ values
        actual = torch.softmax(held_out @ kept.mT * scale, 2) @ fitted.float()
        return ((actual - expected).norm(dim=2) / expected.norm(dim=2)).mean().item()

    output = torch.softmax(few @ keys.mT * scale, 2) @ values
    fitted, _ = fit_values(kept, torch.zeros(1, t), prior, few, output, scale=scale)
    assert held_out_error(fitted) < 0.75
    assert held_out_error(fitted) < held_out_error(prior)


def test_defaults():
    assert fit_values_module.OUTPUT_WEIGHT_POWER == 0.5  # our measurement; the paper has 0
    assert fit_values_module.RIDGE_RANGE == (1e-6, 1e-1)  # our measurement; the paper has 0
