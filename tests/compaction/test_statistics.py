"""Streamed statistics, against the dense matrix of attention weights."""

import math

import pytest
import torch

from tests.compaction.synthetic import random_problem
from vllm_am.compaction.statistics import SCORE_NORMS, attention_statistics


def dense(keys, values, queries, bias=None):
    scores = queries.double() @ keys.double().mT / math.sqrt(keys.shape[2])
    if bias is not None:
        scores = scores + bias.double().unsqueeze(1)
    weights = torch.softmax(scores, 2)
    norms = {
        "rms": weights.square().mean(1).sqrt(),
        "max": weights.amax(1),
        "mean": weights.mean(1),
    }
    return torch.logsumexp(scores, 2), weights @ values.double(), norms


@pytest.mark.parametrize(
    ("H", "T", "N", "D"),
    [(1, 1, 1, 64), (3, 63, 37, 60), (2, 500, 129, 128), (5, 64, 1, 64), (2, 1, 50, 64)],
)
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 30])
def test_matches_dense_whatever_the_block_size(H, T, N, D, chunk_bytes):
    keys, values, queries = random_problem(H, T, N, D)
    bias = torch.linspace(-3, 3, H * T).view(H, T)
    result = attention_statistics(
        keys,
        values,
        queries,
        scale=D**-0.5,
        key_bias=bias,
        norms=SCORE_NORMS,
        chunk_bytes=chunk_bytes,
    )
    lse, output, norms = dense(keys, values, queries, bias)
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.output.double(), output, rtol=1e-5, atol=1e-5)
    for norm in SCORE_NORMS:
        actual = result.scores[norm].double()
        torch.testing.assert_close(actual, norms[norm], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    keys, values, queries = random_problem(2, 100, 40, 64, dtype=dtype)
    result = attention_statistics(keys, values, queries, scale=64**-0.5)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.lse.dtype == result.output.dtype == result.scores["rms"].dtype == wide
    lse, output, _ = dense(keys, values, queries)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(result.lse.double(), lse, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.output.double(), output, rtol=tolerance, atol=tolerance)


def test_absent_keys_count_for_nothing():
    keys, values, queries = random_problem(2, 30, 20, 64)
    bias = torch.zeros(2, 30)
    bias[0, 10:] = -torch.inf
    bias[1] = -torch.inf
    result = attention_statistics(
        keys, values, queries, scale=0.125, key_bias=bias, norms=SCORE_NORMS
    )
    lse, output, _ = dense(keys[:1, :10], values[:1, :10], queries[:1])
    torch.testing.assert_close(result.lse[:1].double(), lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.output[:1].double(), output, rtol=1e-5, atol=1e-5)
    assert result.lse[1].isneginf().all()
    assert torch.equal(result.output[1], torch.zeros_like(result.output[1]))
    for norm in SCORE_NORMS:
        assert torch.equal(result.scores[norm][0, 10:], torch.zeros(20))
        assert torch.equal(result.scores[norm][1], torch.zeros(30))


def test_no_keys_at_all():
    keys, values, queries = random_problem(2, 0, 20, 64)
    result = attention_statistics(keys, values, queries, scale=0.125, norms=SCORE_NORMS)
    assert result.lse.isneginf().all() and (result.output == 0).all()
    assert all(score.shape == (2, 0) for score in result.scores.values())


def test_scores_that_overflow_are_seen():
    """Silently finite numbers here would hide a head that cannot be fitted."""
    keys, values, queries = random_problem(2, 30, 20, 64)
    keys[1] *= 1e30
    queries[1] *= 1e30
    result = attention_statistics(keys, values, queries, scale=0.125)
    assert result.lse[0].isfinite().all() and result.output[0].isfinite().all()
    assert not result.lse[1].isfinite().any()


def test_temporaries_stay_within_the_budget(monkeypatch):
    """No block of scores is larger than asked for, so N and T may be anything; and one allocation
    serves them all."""
    from vllm_am.compaction import attend, statistics

    blocks = []

    def spy(queries, keys, bias, scale, **more):
        weights, lse = attend.attention_weights(queries, keys, bias, scale, **more)
        blocks.append((weights.numel() * weights.itemsize, weights.data_ptr()))
        return weights, lse

    monkeypatch.setattr(statistics, "attention_weights", spy)
    keys, values, queries = random_problem(4, 256, 2000, 64)
    attention_statistics(keys, values, queries, scale=0.125, chunk_bytes=1 << 18)
    assert max(size for size, _ in blocks) <= 1 << 18
    assert sum(size for size, _ in blocks) == 4 * 256 * 2000 * 4
    assert len({address for _, address in blocks}) == 1
