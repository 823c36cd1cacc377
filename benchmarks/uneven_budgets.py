"""Budgets as heads of a real model get them, for benchmarks whose heads are made up."""

from __future__ import annotations

import torch
from torch import Tensor

#: Budgets of the 90 KV heads of SmolLM2-135M over their mean, sorted: with the default options at
#: 20x, of a span of 6,400 tokens of English prose.
SHARES = (
    *(0.1,) * 3, *(0.2,) * 34, *(0.3,) * 14, *(0.4,) * 7, *(0.5,) * 7, *(0.6,) * 2, *(0.7,) * 4,
    *(0.8,) * 2, *(0.9,) * 2, 1.1, 1.2, 1.2, 1.7, 1.7, 1.9, 2.1, 2.8, 3.4, 4.3, 6.0, 7.1, 7.1, 9.0,
    14.4,
)  # fmt: skip


def uneven_budgets(heads: int, tokens: int, ratio: float, page: int = 16) -> Tensor:
    """Slots of each of some heads, int64 [heads] in whole pages: equidistant quantiles."""
    places = (torch.arange(heads) + 0.5) / heads * len(SHARES)
    shares = torch.tensor(SHARES)[places.long()]
    slots = (shares / shares.mean() * ratio * tokens / page).round().clamp(min=1) * page
    return slots.long().clamp(max=tokens)
