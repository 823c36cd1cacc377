"""Heads that copy are found, and their keys count for more."""

from __future__ import annotations

import pytest
import torch

from vllm_am.compaction.budgets import global_pages
from vllm_am.compaction.copying_heads import (
    COPIED_TOKENS,
    COPYING_GAIN,
    copying_scores,
    head_weights,
    tokens_to_copy,
)


@pytest.mark.parametrize(
    ("vocabulary", "most", "first", "count"),
    [(50_000, 2000, 1, COPIED_TOKENS), (50_000, 101, None, 50), (40, 2000, 7, 40), (5, 1, 0, 0)],
)
def test_tokens(vocabulary, most, first, count):
    beginning, *copied = tokens_to_copy(vocabulary, most, first)
    assert len(copied) == len(set(copied)) == count
    assert all(0 <= token < vocabulary for token in [beginning, *copied])
    assert first is None or beginning == first
    assert tokens_to_copy(vocabulary, most, first) == [beginning, *copied], "the same everywhere"
    assert 1 + 2 * count <= max(most, 1)


def readings(before: int, count: int, seed: int = 0) -> torch.Tensor:
    """[before + 2 count, D]: what each token is like, the second reading as the first."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(before + count, 64, generator=generator))
    return torch.cat([rows, rows[before:]])


@pytest.mark.parametrize("before", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_copy(before, dtype):
    """One looks for the token behind the earlier one, one for that itself, one for neither; the
    second query head of each group does something else."""
    count, strength = 48, 40.0
    rows = readings(before, count)
    other = readings(before, count, seed=1)
    second = rows[-count:]
    behind = rows.roll(1, dims=0)  # a key tells what stood before it
    keys = torch.stack([behind, rows, other])
    queries = strength * torch.stack(
        [
            torch.stack([other[-count:], second]),
            torch.stack([second, other[-count:]]),
            torch.stack([second, -second]),
        ]
    )
    scores = copying_scores(queries.to(dtype), keys.to(dtype), scale=1.0)
    assert scores.dtype == torch.float32
    # The token behind the last one of the first reading is in the second, and a token is its own
    # neighbour there: half of the attention goes to what has been read just now.
    assert scores[0] > 0.9 and 0.4 < scores[1] < 0.6 and scores[2] < 0.2


def test_nothing_behind_itself_is_seen():
    """The last key draws all attention of whoever sees it, which is the last query alone."""
    count = 32
    rows = readings(1, count)
    keys = rows.roll(1, dims=0)[None]
    queries = 40 * rows[None, None, -count:] + 40 * torch.eye(64)[0]
    changed = keys.clone()
    changed[:, -1] = 1e3 * torch.eye(64)[0]
    before, after = (copying_scores(queries, k, 1.0) for k in (keys, changed))
    assert before > 0.9
    assert before - after <= 1 / count + 1e-6


def test_weights():
    weights = head_weights(torch.tensor([0.0, 0.019, 0.03, 1.0]))
    assert weights.dtype == torch.float64
    assert weights[:2].tolist() == [1.0, 1.0]
    assert weights[2:].square().tolist() == pytest.approx(
        [1 + 0.03 * COPYING_GAIN, 1 + COPYING_GAIN], rel=1e-6
    )


def test_pages_follow_the_weights():
    scores = torch.rand(6, 160, generator=torch.Generator().manual_seed(0))
    alike = global_pages(scores, 24, 16)
    assert torch.equal(alike, global_pages(scores, 24, 16, torch.ones(6, dtype=torch.float64)))
    more = global_pages(scores, 24, 16, torch.tensor([1.0, 1, 1, 3, 1, 1], dtype=torch.float64))
    assert more.sum() == alike.sum() == 24
    assert more[3] > alike[3] and int(more.max()) <= 10
    assert (more[[0, 1, 2, 4, 5]] <= alike[[0, 1, 2, 4, 5]]).all()
