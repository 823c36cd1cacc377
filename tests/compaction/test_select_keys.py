"""Selection of keys by score."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_am.compaction.select_keys import gather_keys, top_keys


def test_highest_scores_in_ascending_order():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [3.0, 1.0, 2.0, 0.0]])
    assert top_keys(scores, torch.tensor([2, 2])).tolist() == [[1, 3], [0, 2]]


def test_ragged_budgets_are_padded():
    scores = torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    picked = top_keys(scores, torch.tensor([0, 3, 1]))
    assert picked.tolist() == [[-1, -1, -1], [0, 1, 2], [2, -1, -1]]
    assert top_keys(scores, torch.tensor([0, 1, 1]), width=2).tolist() == [
        [-1, -1],
        [0, -1],
        [2, -1],
    ]


def test_ties_go_to_the_earlier_key():
    assert top_keys(torch.zeros(1, 5000), torch.tensor([100])).tolist() == [list(range(100))]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data(), heads=st.integers(1, 4), columns=st.integers(1, 30))
def test_properties(data, heads, columns):
    budgets = torch.tensor(
        data.draw(st.lists(st.integers(0, columns), min_size=heads, max_size=heads))
    )
    levels = st.lists(st.integers(0, 5), min_size=heads * columns, max_size=heads * columns)
    scores = torch.tensor(data.draw(levels)).float().view(heads, columns)  # full of ties
    picked = top_keys(scores, budgets)
    for head, budget in enumerate(budgets.tolist()):
        kept = picked[head, :budget].tolist()
        assert (picked[head, budget:] == -1).all()
        assert kept == sorted(set(kept))
        # The reference: python's stable sort.
        order = sorted(range(columns), key=lambda j: -scores[head, j].item())
        assert kept == sorted(order[:budget])


def test_gather_is_exact_and_does_not_leak():
    rows = torch.randn(2, 5, 3)
    rows[0, 0] = torch.nan
    picked = gather_keys(rows, torch.tensor([[1, 4], [2, -1]]))
    assert torch.equal(picked[0], rows[0, [1, 4]])
    assert torch.equal(picked[1], torch.stack([rows[1, 2], torch.zeros(3)]))
    padding = gather_keys(rows, torch.tensor([[-1], [0]]))
    assert torch.equal(padding[0], torch.zeros(1, 3))
