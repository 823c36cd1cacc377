"""Attention statistics of the Triton kernels, against a few lines of torch in fp64.

Tolerances, relative to the fp64 result on the same (rounded) inputs: the lse and the scores are
fp32 throughout; the output is limited by the rounding of the weights to the values' dtype.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.kernels.device import DTYPES, ON_GPU
from vllm_am.compaction.pages import PagedKV
from vllm_am.compaction.statistics import SCORE_NORMS, AttentionStatistics
from vllm_am.compaction.statistics import attention_statistics as attention_statistics_torch
from vllm_am.kernels.statistics import attention_lse, attention_statistics
from vllm_am.kernels.statistics import attention_statistics_paged as statistics_paged

# log2(0) is meant, and numpy, which the interpreter computes with, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

OUTPUT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

# H, N, T, D, Dv: one of each, odd sizes, head sizes in one and in two parts, several blocks.
SHAPES = [
    (1, 1, 1, 64, 64),
    (2, 37, 63, 60, 60),
    (2, 33, 32, 80, 80),
    (1, 50, 131, 96, 96),
    (2, 16, 100, 128, 128),
    (1, 17, 33, 256, 256),
    (1, 40, 70, 100, 36),
    (3, 5, 65, 64, 80),
    (2, 0, 20, 64, 64),
    (2, 20, 0, 64, 64),
]
if ON_GPU:
    SHAPES += [(3, 1000, 777, D, D) for D in (64, 80, 96, 128, 256)]


def problem(device, H, N, T, D, Dv, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, T, D), (H, T, Dv), (H, N, D))
    keys, values, queries = (torch.randn(*shape, generator=generator) for shape in shapes)
    return tuple(x.to(device, dtype) for x in (keys, values, 1.5 * queries))


def reference(keys, values, queries, scale, bias=None, softcap=0.0) -> AttentionStatistics:
    """Dense, in fp64."""
    scores = queries.double() @ keys.double().mT * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double().unsqueeze(1)
    lse = torch.logsumexp(scores, 2)
    weights = torch.exp(scores - torch.where(lse == -math.inf, math.inf, lse).unsqueeze(2))
    norms = {
        "rms": weights.square().mean(1).sqrt(),
        "max": weights.amax(1) if weights.shape[1] else weights.sum(1),
        "mean": weights.mean(1),
    }
    return AttentionStatistics(lse, weights @ values.double(), norms)


def assert_close(actual, expected, dtype, tolerance=1e-5):
    assert actual.lse.dtype == actual.output.dtype == torch.float32
    double = actual.lse.double(), actual.output.double()
    torch.testing.assert_close(double[0], expected.lse, rtol=tolerance, atol=tolerance)
    close = max(OUTPUT_TOLERANCE[dtype], tolerance)
    torch.testing.assert_close(double[1], expected.output, rtol=close, atol=close)
    for norm, score in actual.scores.items():
        torch.testing.assert_close(
            score.double(), expected.scores[norm], rtol=4 * tolerance, atol=1e-9, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "N", "T", "D", "Dv"), SHAPES)
def test_dense(device, H, N, T, D, Dv, dtype):
    keys, values, queries = problem(device, H, N, T, D, Dv, dtype)
    scale = D**-0.5
    actual = attention_statistics(keys, values, queries, scale=scale, norms=SCORE_NORMS)
    assert set(actual.scores) == set(SCORE_NORMS)
    assert_close(actual, reference(keys, values, queries, scale), dtype)


def test_means_the_same_as_the_torch_path(device):
    keys, values, queries = problem(device, 2, 40, 90, 64, 64)
    bias = torch.randn(2, 90, device=device)
    arguments = {"scale": 0.125, "key_bias": bias, "norms": SCORE_NORMS}
    actual = attention_statistics(keys, values, queries, **arguments)
    expected = attention_statistics_torch(keys, values, queries, **arguments)
    torch.testing.assert_close(actual.lse, expected.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.output, expected.output, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=4e-5, atol=1e-9)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_bias_hides_and_weighs_keys(device, softcap):
    keys, values, queries = problem(device, 3, 20, 70, 64, 64)
    bias = torch.linspace(-3, 3, 210, device=device).view(3, 70)
    bias[0, 40:] = -math.inf
    bias[0, :33] = -math.inf  # a whole block of keys comes before the first visible one
    bias[1] = -math.inf
    actual = attention_statistics(
        keys, values, queries, scale=0.3, key_bias=bias, norms=SCORE_NORMS, softcap=softcap
    )
    assert_close(actual, reference(keys, values, queries, 0.3, bias, softcap), torch.float32)
    assert actual.lse[1].isneginf().all()
    assert not actual.output[1].any()
    for score in actual.scores.values():
        assert not score[1].any()
        assert not score[0, 40:].any()


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(device, softcap):
    keys, values, queries = problem(device, 2, 20, 70, 64, 64)
    actual = attention_statistics(
        keys, values, queries, scale=0.5, norms=SCORE_NORMS, softcap=softcap
    )
    assert_close(actual, reference(keys, values, queries, 0.5, softcap=softcap), torch.float32)
    without = reference(keys, values, queries, 0.5)
    assert (without.lse - actual.lse).abs().max() > 0.1


def test_huge_scores(device):
    """±1e4: no overflow; what remains is fp32's rounding of numbers of that size."""
    keys, values, queries = problem(device, 2, 20, 70, 64, 64)
    scores = queries.double() @ keys.double().mT
    scale = float(1e4 / scores.abs().max())
    actual = attention_statistics(keys, values, queries, scale=scale, norms=SCORE_NORMS)
    expected = reference(keys, values, queries, scale)
    assert expected.lse.max() > 5e3
    assert_close(actual, expected, torch.float32, tolerance=1e-2)


@pytest.mark.parametrize("norm", SCORE_NORMS)
def test_only_the_norms_asked_for(device, norm):
    keys, values, queries = problem(device, 2, 20, 40, 64, 64)
    actual = attention_statistics(keys, values, queries, scale=0.125, norms=(norm,))
    assert set(actual.scores) == {norm}
    assert_close(actual, reference(keys, values, queries, 0.125), torch.float32)
    assert not attention_statistics(keys, values, queries, scale=0.125, norms=()).scores


def test_strides(device):
    keys, values, queries = problem(device, 2, 20, 40, 64, 64)
    views = (
        keys.transpose(0, 1).contiguous().transpose(0, 1),
        values.mT.contiguous().mT,
        torch.cat([queries, queries], 2)[..., :64],
    )
    assert not any(view.is_contiguous() for view in views)
    actual = attention_statistics(*views, scale=0.125, norms=SCORE_NORMS)
    expected = attention_statistics(keys, values, queries, scale=0.125, norms=SCORE_NORMS)
    assert torch.equal(actual.output, expected.output)
    assert torch.equal(actual.lse, expected.lse)
    for norm in SCORE_NORMS:
        assert torch.equal(actual.scores[norm], expected.scores[norm])


def test_a_broken_head_stays_alone(device):
    keys, values, queries = problem(device, 3, 20, 40, 64, 64)
    arguments = {"scale": 0.125, "norms": SCORE_NORMS}
    sound = attention_statistics(keys, values, queries, **arguments)
    keys[1, 7, 3] = math.nan
    broken = attention_statistics(keys, values, queries, **arguments)
    assert broken.lse[1].isnan().all()
    assert broken.output[1].isnan().all()
    for head in (0, 2):
        assert torch.equal(broken.lse[head], sound.lse[head])
        assert torch.equal(broken.output[head], sound.output[head])
        for norm in SCORE_NORMS:
            assert torch.equal(broken.scores[norm][head], sound.scores[norm][head])


def paged_cache(device, D, block_size, dtype, layers=2, blocks=8, heads=2):
    """A cache whose layers share one allocation; every number is random, every bias too."""
    generator = torch.Generator().manual_seed(1)
    shape = (blocks, layers, heads, block_size, 2 * D)
    storage = torch.randn(shape, generator=generator).to(device, dtype)
    kv = PagedKV.from_layers([storage[:, layer] for layer in range(layers)])
    bias = torch.randn(kv.bias.shape, generator=generator)
    return dataclasses.replace(kv, bias=bias.to(device)), generator


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "block_size"), [(64, 16), (80, 8), (128, 1)])
def test_pages(device, D, block_size, dtype, use_bias):
    """Permuted pages of any layer, ragged lengths (0, 1, a full list and in between)."""
    kv, generator = paged_cache(device, D, block_size, dtype)
    P = 5
    page_ids = torch.randperm(len(kv.pages), generator=generator)[: 4 * P].view(4, P).int()
    lengths = torch.tensor([0, 1, P * block_size, max(P * block_size - 3, 2)], dtype=torch.int32)
    queries = torch.randn(4, 19, D, generator=generator).to(device, dtype)
    actual = statistics_paged(
        kv,
        page_ids.to(device),
        lengths.to(device),
        queries,
        scale=0.2,
        norms=SCORE_NORMS,
        use_bias=use_bias,
    )
    entries = kv.pages[page_ids.long()].flatten(1, 2)
    slots = torch.arange(P * block_size)
    bias = torch.where(slots < lengths.unsqueeze(1), 0.0, -math.inf).to(device)
    if use_bias:
        bias = bias + kv.bias[page_ids.long()].flatten(1, 2)
    expected = reference(entries[..., :D], entries[..., D:], queries, 0.2, bias)
    assert actual.scores["rms"].shape == (4, P * block_size)
    assert_close(actual, expected, dtype)


def test_what_lies_behind_the_length_is_not_read(device):
    kv, _ = paged_cache(device, 64, 16, torch.float32)
    page_ids = torch.tensor([[3, 5, 1 << 30]], dtype=torch.int32, device=device)
    lengths = torch.tensor([20], dtype=torch.int32, device=device)
    queries = torch.randn(1, 7, 64, device=device)
    kv.pages[5, 4:] = math.nan
    actual = statistics_paged(kv, page_ids, lengths, queries, scale=0.2, use_bias=True)
    assert actual.output.isfinite().all()
    assert actual.scores["rms"].isfinite().all()


def test_lse_alone(device):
    keys, values, queries = problem(device, 2, 37, 50, 80, 80)
    bias = torch.randn(2, 50, device=device)
    actual = attention_lse(keys, queries, scale=0.2, key_bias=bias)
    full = attention_statistics(keys, values, queries, scale=0.2, key_bias=bias, norms=())
    # On a GPU the two are compiled apart, and round apart.
    torch.testing.assert_close(actual, full.lse, rtol=2e-6 if ON_GPU else 0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": -1.0}, "scale"),
        ({"softcap": -1.0}, "softcap"),
        ({"norms": ("median",)}, "median"),
        ({"values": torch.zeros(1, 3, 64, dtype=torch.float16)}, "one dtype"),
        ({"keys": torch.zeros(1, 3, 300)}, "at most 256"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(device, changes, message):
    keys, values, queries = problem(device, 1, 2, 3, 64, 64)
    arguments = {"keys": keys, "values": values, "queries": queries, "scale": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        attention_statistics(**arguments)
