"""Normal equations of the Triton path, against the plain-torch functions in fp64.

Entries are compared in units of sqrt(G_jj G_kk), right-hand sides in units of the largest entry of
a head. What counts in the end are the solutions: they must be as good as those of fp64.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.compaction.synthetic import SEEDS, synthetic_head
from tests.kernels.device import DTYPES, ON_GPU
from vllm_am.compaction import fit_bias, fit_values
from vllm_am.compaction.fit_bias import LOG_WEIGHT_BOUNDS, solve_box
from vllm_am.compaction.fit_values import output_row_weights, ridge_for, solve_values
from vllm_am.compaction.statistics import attention_statistics
from vllm_am.kernels import gram as gram_module
from vllm_am.kernels.gram import mass_normal_equations, output_normal_equations

# numpy, which the interpreter computes with, warns of exp2(-inf) and the like.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

#: Of random problems; plain torch in fp32 has the same errors (both come from fp32 scores). Tensor
#: cores cut off where a CPU rounds.
TOLERANCE = 2e-5 if ON_GPU else 4e-6

CHUNK_BYTES = 1 << 23

# H, n, t, D, Dv: t within a block and over several, odd sizes, both parts of a row.
SHAPES = [
    (1, 1, 1, 64, 64),
    (2, 40, 7, 60, 60),
    (2, 37, 33, 80, 80),
    (1, 70, 65, 96, 40),
    (3, 50, 32, 128, 128),
    (1, 20, 20, 256, 256),
    (2, 0, 5, 64, 64),
    (2, 5, 0, 64, 64),
]
if ON_GPU:
    SHAPES += [(2, 5000, 300, 128, 128), (1, 9000, 4096, 128, 128), (4, 3000, 1001, 256, 256)]


def problem(device, H, n, t, D, Dv, dtype=torch.float32, seed=0):
    """Kept keys and bias, queries, and what they saw in a cache of twice as many keys."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, 2 * t, D), (H, 2 * t, Dv), (H, n, D))
    keys, values, queries = (
        torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes
    )
    bias = torch.linspace(-1, 1, H * 2 * t, device=device).view(H, 2 * t)
    full = attention_statistics(keys, values, queries, scale=D**-0.5, key_bias=bias, norms=())
    return keys[:, :t], bias[:, :t], queries, full.lse, full.output


def mass_reference(keys, bias, queries, lse, scale, weights=None):
    tensors = (x.double() for x in (keys, bias, queries, lse))
    return fit_bias.mass_normal_equations(
        *tensors, scale=scale, row_weights=weights, chunk_bytes=CHUNK_BYTES
    )


def output_reference(keys, bias, queries, output, scale, weights=None):
    tensors = (x.double() for x in (keys, bias, queries, output))
    return fit_values.output_normal_equations(
        *tensors, scale=scale, row_weights=weights, chunk_bytes=CHUNK_BYTES
    )


def assert_close(actual, expected, tolerance=TOLERANCE):
    for part in actual:
        assert part.dtype == torch.float64
    if expected[0].numel() == 0 or expected[0].isnan().all():  # nothing to fit
        assert actual[0].shape == expected[0].shape
        return
    norm = expected[0].diagonal(dim1=1, dim2=2).sqrt()
    unit = norm.unsqueeze(2) * norm.unsqueeze(1)
    # 1e-9 of the largest: columns whose weights are that small do not matter to any fit.
    error = (actual[0] - expected[0]).abs() - 1e-9 * unit.amax()
    assert float((error / unit.clamp(min=1e-300)).amax()) <= tolerance
    flat = expected[1].flatten(1).abs().amax(1).view(-1, *[1] * (expected[1].dim() - 1))
    assert float(((actual[1] - expected[1]).abs() / flat.clamp(min=1e-300)).amax()) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "n", "t", "D", "Dv"), SHAPES)
def test_entries(device, H, n, t, D, Dv, dtype):
    keys, bias, queries, lse, output = problem(device, H, n, t, D, Dv, dtype)
    scale = D**-0.5
    actual = mass_normal_equations(keys, bias, queries, lse, scale=scale)
    assert_close(actual, mass_reference(keys, bias, queries, lse, scale))
    actual = output_normal_equations(keys, bias, queries, output, scale=scale)
    assert_close(actual, output_reference(keys, bias, queries, output, scale))
    if n > 0:
        weights = torch.linspace(1, 0.01, n, device=device)
        actual = mass_normal_equations(keys, bias, queries, lse, scale=scale, row_weights=weights)
        assert_close(actual, mass_reference(keys, bias, queries, lse, scale, weights))
        actual = output_normal_equations(
            keys, bias, queries, output, scale=scale, row_weights=weights
        )
        assert_close(actual, output_reference(keys, bias, queries, output, scale, weights))


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_solutions_are_as_good_as_those_of_fp64(device, seed):
    """Both fits on a synthetic head: the fp64 objective of the solutions, and the solutions."""
    keys, values, queries, _ = (x.to(device) for x in synthetic_head(seed, T=256, d=64, n=400, m=1))
    scale, t = 0.125, 40
    full = attention_statistics(keys, values, queries, scale=scale)
    kept = full.scores["rms"][0].topk(t).indices.sort().values
    keys, prior, bias = keys[:, kept], values[:, kept], torch.zeros(1, t, device=device)

    exact = mass_reference(keys, bias, queries, full.lse, scale)
    ours = mass_normal_equations(keys, bias, queries, full.lse, scale=scale)
    bounds = [math.exp(bound) for bound in LOG_WEIGHT_BOUNDS]
    expected, actual = (solve_box(*equations, *bounds).x for equations in (exact, ours))

    def mass_objective(w):
        return float(w[0] @ exact[0][0] @ w[0] - 2 * exact[1][0] @ w[0]) + 1

    assert mass_objective(actual) == pytest.approx(mass_objective(expected), rel=1e-6)
    torch.testing.assert_close(actual.log(), expected.log(), rtol=0, atol=2e-3)

    bias = actual.log().float()
    exact = output_reference(keys, bias, queries, full.output, scale)
    ours = output_normal_equations(keys, bias, queries, full.output, scale=scale)
    ridge = ridge_for(queries.shape[1], torch.tensor([t])).to(device)
    (expected, _), (actual, _) = (
        solve_values(*equations, prior.double(), ridge) for equations in (exact, ours)
    )
    weighted = full.output.double() * output_row_weights(full.output.double())
    constant = float(weighted.square().sum())
    shift = float(ridge * exact[0].diagonal(dim1=1, dim2=2).mean())

    def output_objective(C):
        fit = torch.sum(C * (exact[0] @ C)) - 2 * torch.sum(C * exact[1]) + constant
        return float(fit + shift * (C - prior.double()).square().sum())

    assert output_objective(actual) == pytest.approx(output_objective(expected), rel=1e-6)
    assert (actual - expected).norm() / expected.norm() < 1e-3


def test_padding_counts_for_nothing(device):
    keys, bias, queries, lse, output = problem(device, 3, 40, 40, 64, 64)
    lengths = (40, 13, 0)
    for head, length in enumerate(lengths):
        bias[head, length:] = -math.inf
    gram, rhs = mass_normal_equations(keys, bias, queries, lse, scale=0.125)
    assert_close((gram, rhs), mass_reference(keys, bias, queries, lse, 0.125))
    design, targets = output_normal_equations(keys, bias, queries, output, scale=0.125)
    assert_close((design, targets), output_reference(keys, bias, queries, output, 0.125))
    for head, length in enumerate(lengths):
        for part in (gram, rhs, design, targets):
            assert not part[head, length:].any()
        for part in (gram, design):
            assert not part[head, :, length:].any()


def test_a_query_that_sees_nothing_counts_for_nothing(device):
    keys, bias, queries, lse, _ = problem(device, 1, 40, 20, 64, 64)
    seen = lse.clone()
    lse[0, 3] = -math.inf
    gram, rhs = mass_normal_equations(keys, bias, queries, lse, scale=0.125)
    others = [i for i in range(40) if i != 3]
    expected = mass_reference(keys, bias, queries[:, others], seen[:, others], 0.125)
    assert_close((gram * 40 / 39, rhs * 40 / 39), expected)


def test_huge_scores(device):
    """±1e4: no overflow; what remains is fp32's rounding of numbers of that size."""
    keys, bias, queries, _, _ = problem(device, 2, 40, 20, 64, 64)
    scale = float(1e4 / (queries @ keys.mT).abs().max())
    full = attention_statistics(keys, keys, queries, scale=scale, key_bias=bias, norms=())
    actual = mass_normal_equations(keys, bias, queries, full.lse, scale=scale)
    assert_close(actual, mass_reference(keys, bias, queries, full.lse, scale), 1e-2)
    actual = output_normal_equations(keys, bias, queries, full.output, scale=scale)
    assert_close(actual, output_reference(keys, bias, queries, full.output, scale), 1e-2)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_values_of_any_size(device, size):
    """Targets are scaled head by head: a head's neighbour may be a million times larger."""
    keys, bias, queries, _, output = problem(device, 2, 40, 20, 64, 64)
    output[1] *= size
    actual = output_normal_equations(keys, bias, queries, output, scale=0.125)
    assert_close(actual, output_reference(keys, bias, queries, output, 0.125))


@pytest.mark.parametrize(("heads", "bands"), [(1, 1), (3, 1), (5, 1), (5, 2), (5, 3)])
def test_bands_and_groups_of_heads(device, monkeypatch, heads, bands):
    """So many at once, of five heads and of three bands of 32 rows, the last of which has 11."""
    keys, bias, queries, lse, output = problem(device, 5, 75, 20, 64, 64)
    halves, sums = 4 * 32 * 32, 4 * 32 * 2 * (32 + 32)
    room = heads * (sums + (halves if bands == 1 else bands * (halves + sums)))
    monkeypatch.setattr(gram_module, "_BAND_ROWS", 32)
    monkeypatch.setattr(gram_module, "_WORKSPACE_BYTES", room)
    batches = []
    write = gram_module._Design.write

    def observed(self, part, first, halves):
        batches.append((len(halves), halves.shape[1] // 32))
        write(self, part, first, halves)

    monkeypatch.setattr(gram_module._Design, "write", observed)
    actual = mass_normal_equations(keys, bias, queries, lse, scale=0.125)
    assert_close(actual, mass_reference(keys, bias, queries, lse, 0.125))
    assert batches[0] == (heads, bands)
    assert sum(count * number for count, number in batches) == 5 * 3
    actual = output_normal_equations(keys, bias, queries, output, scale=0.125)
    assert_close(actual, output_reference(keys, bias, queries, output, 0.125))


def test_softcap(device):
    keys, bias, queries, lse, _ = problem(device, 1, 40, 20, 64, 64)
    actual = mass_normal_equations(keys, bias, queries, lse, scale=0.5, softcap=2.0)
    scores = 2.0 * torch.tanh(queries.double() @ keys.double().mT * 0.5 / 2.0)
    weights = torch.exp(scores + bias.double().unsqueeze(1) - lse.double().unsqueeze(2))
    assert_close(actual, (weights.mT @ weights / 40, weights.mean(1)))


def test_strides(device):
    keys, bias, queries, lse, output = problem(device, 2, 40, 20, 64, 64)
    assert not keys.is_contiguous()
    views = (
        keys.contiguous(),
        bias.mT.contiguous().mT,
        queries.mT.contiguous().mT,
        lse.mT.contiguous().mT,
        torch.cat([output, output], 2)[..., :64],
    )
    for launch, last in ((mass_normal_equations, 3), (output_normal_equations, 4)):
        plain = launch(keys, bias, queries, (lse, output)[last - 3], scale=0.125)
        viewed = launch(*views[:3], views[last], scale=0.125)
        for a, b in zip(plain, viewed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_broken_head_stays_alone(device):
    keys, bias, queries, lse, output = problem(device, 3, 40, 20, 64, 64)
    broken_keys, broken_output = keys.clone(), output.clone()
    broken_keys[1, 7, 3] = math.nan
    broken_output[1, 5, 2] = math.inf
    for launch, column, broken in (
        (mass_normal_equations, lse, lse),
        (output_normal_equations, output, broken_output),
    ):
        sound = launch(keys, bias, queries, column, scale=0.125)
        spoiled = launch(broken_keys, bias, queries, broken, scale=0.125)
        for a, b in zip(sound, spoiled, strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
            assert b[1].isnan().any()


def test_refuses(device):
    keys, bias, queries, lse, output = problem(device, 1, 4, 3, 64, 64)
    with pytest.raises(ValueError, match="one dtype"):
        mass_normal_equations(keys.half(), bias, queries, lse, scale=0.125)
    with pytest.raises(ValueError, match="scale"):
        output_normal_equations(keys, bias, queries, output, scale=0.0)
