"""How the pages of a compacted span are divided among the heads: a rule's name, or a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_am.config.errors import CompactionConfigError

#: How the pages of a compacted span are divided among the heads, where no file says it.
BUDGETS = ("uniform", "global")


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
            shares = json.loads(Path(value).read_text())
        except (OSError, ValueError) as error:
            raise CompactionConfigError(
                f"{name}={value!r}: expected {', '.join(BUDGETS)} or the path of a JSON file "
                f"({error})"
            ) from None
    if not isinstance(shares, Mapping) or not shares:
        raise CompactionConfigError(
            f'{name}={value!r}: expected an object of shares such as {{"L0H0": 0.01, ...}}'
        )
    for key, share in shares.items():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not re.fullmatch(r"L\d+H\d+", str(key)) or not number or not 0 <= share < math.inf:
            raise CompactionConfigError(
                f"{name}={value!r}: {key!r}: {share!r}, expected L<layer>H<KV head>: share >= 0"
            )
    if not any(shares.values()):
        raise CompactionConfigError(f"{name}={value!r}: all shares are zero")
    return dict(shares)
