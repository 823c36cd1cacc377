"""Which queries a fit reads, and that they stand for all."""

import pytest
import torch

from tests.compaction.synthetic import random_problem, synthetic_head
from vllm_am.compaction import compact, evaluate_fit
from vllm_am.compaction import sample_queries as module
from vllm_am.compaction.fit_bias import mass_normal_equations
from vllm_am.compaction.fit_values import output_normal_equations
from vllm_am.compaction.sample_queries import sample_queries, sample_size
from vllm_am.compaction.select_keys import gather_keys
from vllm_am.compaction.statistics import AttentionStatistics, attention_statistics

CHUNK = 1 << 20
SCALE = 0.125


@pytest.fixture
def small(monkeypatch):
    """Samples of few queries."""
    monkeypatch.setattr(module, "FEWEST_QUERIES", 40)


def kept_of(keys, values, queries, slots, bias=None):
    """The keys of highest attention, their bias and scores, and the statistics."""
    statistics = attention_statistics(keys, values, queries, scale=SCALE, key_bias=bias)
    scores = statistics.scores["rms"]
    chosen = scores.topk(slots, dim=1).indices.sort(dim=1).values
    bias = torch.zeros_like(scores) if bias is None else bias
    return gather_keys(keys, chosen), bias.gather(1, chosen), scores.gather(1, chosen), statistics


def drawn(keys, values, queries, slots, bias=None):
    kept, kept_bias, scores, statistics = kept_of(keys, values, queries, slots, bias)
    return (
        kept,
        kept_bias,
        statistics,
        sample_queries(
            kept, kept_bias, scores, queries, statistics, scale=SCALE, chunk_bytes=CHUNK
        ),
    )


def leverage(keys, bias, queries, lse):
    """[H, N], as the docstring of the module has it."""
    weights = torch.exp(SCALE * queries @ keys.mT + bias.unsqueeze(1) - lse.unsqueeze(2)).square()
    return (weights / weights.sum(dim=1, keepdim=True)).sum(dim=2)


def rows_of(sample, queries):
    """[H, n], where in ``queries`` each of the sample stands."""
    return (sample.queries.unsqueeze(2) == queries.unsqueeze(1)).all(3).int().argmax(2)


def test_sizes():
    assert sample_size(2048, 10) == 2048  # few queries: all
    assert sample_size(2700, 10) == 2700  # it would not be worth it
    assert sample_size(8192, 10) == 2048
    assert sample_size(8192, 1000) == 4000
    assert sample_size(8192, 1600) == 8192
    assert sample_size(0, 10) == 0


def test_few_queries_are_read_as_they_are():
    keys, values, queries = random_problem(2, 50, 60, 64)
    *_, statistics, sample = drawn(keys, values, queries, 8)
    assert sample.queries is queries and sample.weights is None
    assert sample.lse is statistics.lse and sample.output is statistics.output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_highest_half_and_every_so_many_th_of_the_rest(small, dtype):
    keys, values, queries = random_problem(3, 64, 203, 64, dtype=dtype)
    bias = torch.linspace(-2, 2, 3 * 64).view(3, 64)
    kept, kept_bias, statistics, sample = drawn(keys, values, queries, 9, bias)
    exact = leverage(kept.double(), kept_bias.double(), queries.double(), statistics.lse.double())
    rows = rows_of(sample, queries)
    assert rows.shape == (3, 40) and all(len(row.unique()) == 40 for row in rows)
    for head in range(3):
        mine = exact[head, rows[head]]
        assert torch.all(mine.diff() <= 1e-5)  # from the highest down
        others = exact[head].sort(descending=True).values
        torch.testing.assert_close(mine[:20], others[:20], rtol=1e-3, atol=1e-5)
        places = 20 + torch.arange(20) * 183 // 20
        torch.testing.assert_close(mine[20:], others[places], rtol=1e-3, atol=1e-5)
    heads = torch.arange(3).unsqueeze(1)
    assert torch.equal(sample.lse, statistics.lse[heads, rows])
    assert torch.equal(sample.output, statistics.output[heads, rows])
    # Each of the first stands for itself, the others together for all that were left out.
    assert float(sample.weights.max()) == 1
    assert float(sample.weights.sum() / sample.weights[0]) == pytest.approx(203)


def asked_once():
    """A head in which eight keys have one query each that asks for them: keys, values, queries,
    and which of the queries these are."""
    generator = torch.Generator().manual_seed(0)
    keys = 0.1 * torch.randn(1, 300, 64, generator=generator)
    values = torch.randn(1, 300, 64, generator=generator)
    queries = torch.randn(1, 400, 64, generator=generator)
    keys[0, :8] = 12 * torch.nn.functional.normalize(torch.randn(8, 64, generator=generator), dim=1)
    queries -= 0.9 / 144 * queries @ keys[0, :8].T @ keys[0, :8]
    askers = torch.randperm(400, generator=generator)[:8]
    queries[0, askers] = keys[0, :8]
    return keys, values, queries, askers


def test_who_alone_asks_for_a_key_is_always_read(small):
    keys, values, queries, askers = asked_once()
    kept, *_, sample = drawn(keys, values, queries, 12)
    assert all((kept == key).all(2).any() for key in keys[0, :8])
    assert set(askers.tolist()) <= set(rows_of(sample, queries)[0].tolist())


def test_a_head_does_not_depend_on_its_neighbours(small):
    keys, values, queries = random_problem(3, 64, 203, 64)
    *_, together = drawn(keys, values, queries, 9)
    *_, alone = drawn(keys[1:2], values[1:2], queries[1:2], 9)
    assert torch.equal(together.queries[1:2], alone.queries)


def test_a_weight_is_a_number_of_queries():
    """Rows that count twice are rows that are there twice."""
    keys, values, queries = random_problem(2, 40, 30, 64)
    kept, bias, _, statistics = kept_of(keys, values, queries, 7)
    weights = torch.tensor([0.5, 1.0] * 15)
    twice = torch.cat([queries, queries[:, 1::2]], dim=1)
    lse, output = (
        torch.cat([part, part[:, 1::2]], dim=1) for part in (statistics.lse, statistics.output)
    )
    for equations, seen, again in (
        (mass_normal_equations, statistics.lse, lse),
        (output_normal_equations, statistics.output, output),
    ):
        weighed = equations(kept, bias, queries, seen, scale=SCALE, row_weights=weights)
        repeated = equations(kept, bias, twice, again, scale=SCALE)
        # Up to a factor, that of a mean over queries or of their outputs.
        factor = weighed[0].diagonal(dim1=1, dim2=2).sum(1) / repeated[0].diagonal(
            dim1=1, dim2=2
        ).sum(1)
        for one, other in zip(weighed, repeated, strict=True):
            other = other * factor.view(-1, *[1] * (other.dim() - 1))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    gram, rhs = mass_normal_equations(
        kept, bias, queries, statistics.lse, scale=SCALE, row_weights=weights
    )
    expected = mass_normal_equations(kept, bias, twice, lse, scale=SCALE)
    torch.testing.assert_close((gram, rhs), expected, rtol=1e-5, atol=1e-8)


def test_fits_are_as_good_as_from_all_queries(monkeypatch):
    """Held-out errors on synthetic heads, whose queries are all of one kind."""
    errors = {"all": 0.0, "sample": 0.0}
    for seed in (0, 1, 2):
        keys, values, queries, held_out = synthetic_head(seed, n=6000)
        for name, fewest in (("all", 6000), ("sample", 1024)):
            monkeypatch.setattr(module, "FEWEST_QUERIES", fewest)
            fitted = compact(keys, values, queries, budget=51)
            quality = evaluate_fit(fitted, keys, values, held_out)
            errors[name] += float(quality.output_error) + float(quality.mass_error)
    assert errors["sample"] < 1.02 * errors["all"]


def test_keys_that_one_query_asks_for_stay_known(monkeypatch):
    """Their askers are answered as from all queries; from every tenth by position they are not."""
    keys, values, queries, askers = asked_once()
    statistics = attention_statistics(keys, values, queries, scale=SCALE)
    errors = {}
    for name, fewest, rows in (
        ("all", 400, slice(None)),
        ("sample", 40, slice(None)),
        ("fewer", 40, slice(None, None, 10)),
    ):
        monkeypatch.setattr(module, "FEWEST_QUERIES", fewest)
        known = AttentionStatistics(
            statistics.lse[:, rows], statistics.output[:, rows], statistics.scores
        )
        # The same scores, and so the same keys: it is the fit that is tested.
        mine = queries[:, rows]
        fitted = compact(keys, values, mine, budget=12, scale=SCALE, statistics=known)
        quality = evaluate_fit(fitted, keys, values, queries[:, askers], scale=SCALE)
        errors[name] = float(quality.output_error)
    assert errors["sample"] < 1.2 * errors["all"] < 0.5 * errors["fewer"]


def test_the_errors_of_a_fit_are_means_over_all_queries(monkeypatch):
    """As far as a sample tells."""
    monkeypatch.setattr(module, "FEWEST_QUERIES", 600)
    keys, values, queries, _ = synthetic_head(0, n=1000)
    fitted = compact(keys, values, queries, budget=20)
    quality = evaluate_fit(fitted, keys, values, queries)
    assert float(fitted.output_error) == pytest.approx(float(quality.output_error), rel=0.05)
    assert float(fitted.mass_error) == pytest.approx(float(quality.mass_error), rel=0.05)
