"""How the pages of a compacted span are divided among the heads: a rule's name, or a file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_am.config.errors import CompactionConfigError, shown
from vllm_am.config.json_text import parse_json

#: How the pages of a compacted span are divided among the heads, where no file says it.
BUDGETS = ("auto", "global", "uniform")
#: Those that follow the scores of the sequence.
BY_SCORES = ("auto", "global")
#: Name of a KV head; one for each, so no leading zeros.
HEAD = re.compile(r"L(0|[1-9]\d*)H(0|[1-9]\d*)")


def parse_budgets(value: Any, name: str = "--kv-compaction-config budgets") -> Any:
    """One of :data:`BUDGETS`, or the shares of a budgets file ``{"L{layer}H{head}": share}``.

    Args:
        value: a name, the path of a JSON file, or its content.

    Raises:
        CompactionConfigError: not one of these, or a share that is not a number >= 0.
    """
    if isinstance(value, str) and value in BUDGETS:
        return value
    shares: Any = value
    if isinstance(value, str):
        try:
            shares = parse_json(Path(value).read_text())
        except (OSError, ValueError) as error:
            raise CompactionConfigError(
                f"{name}={shown(value)}: expected {', '.join(BUDGETS)} or the path of a JSON file "
                f"({error})"
            ) from None
    if not isinstance(shares, Mapping) or not shares:
        raise CompactionConfigError(
            f'{name}={shown(value)}: expected an object of shares such as {{"L0H0": 0.01, ...}}'
        )
    for key, share in shares.items():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not HEAD.fullmatch(str(key)) or not number or not 0 <= share < math.inf:
            raise CompactionConfigError(
                f"{name}={shown(value)}: {shown(key)}: {shown(share)}, expected "
                "L<layer>H<KV head>: share >= 0, such as L0H0: 0.01"
            )
    if not any(shares.values()):
        raise CompactionConfigError(f"{name}={shown(value)}: all shares are zero")
    return dict(shares)
