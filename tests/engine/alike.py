"""Outputs of bfloat16 models, which are the same but for rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

#: Of log-probabilities.
ROUNDING = 0.2

#: By request and position, the log-probabilities of the likeliest tokens.
Likely = Sequence[Sequence[dict[Any, float]]]


def assert_alike(found: Likely, wanted: Likely) -> None:
    """But for rounding; behind a token that differs by it, the texts do."""
    for ours, stock in zip(found, wanted, strict=True):
        for after, before in zip(ours, stock, strict=True):
            both = before.keys() & after.keys()
            assert len(both) >= 4
            assert max(abs(before[token] - after[token]) for token in both) < ROUNDING
            if max(before, key=lambda t: before[t]) != max(after, key=lambda t: after[t]):
                break


def assert_differs(found: Likely, wanted: Likely) -> None:
    """By more than that."""
    with pytest.raises(AssertionError):
        assert_alike(found, wanted)
