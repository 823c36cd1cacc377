"""How much is kept: ``0.05``, ``"0.05"`` and ``"20x"`` are one."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def share_kept(ratio: Any) -> float:
    """The share of the keys that is kept.

    Args:
        ratio: a number in (0, 1], or text: such a number, or a factor such as ``"20x"``.

    Raises:
        ValueError: it is none of these; the message does not repeat it.
    """
    share = math.nan
    try:
        if isinstance(ratio, str):
            text = ratio.strip().lower()
            share = 1.0 / float(text[:-1]) if text.endswith("x") else float(text)
        elif not isinstance(ratio, bool) and isinstance(ratio, Real):
            share = float(ratio)
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    if not 0.0 < share <= 1.0:
        raise ValueError(
            "expected the fraction of the KV cache that is KEPT, a number in (0, 1] such as 0.1, "
            "or a factor such as 10x (which keeps a tenth)"
        )
    return share
