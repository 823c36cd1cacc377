"""JSON that a user has written: what the standard parser lets pass is refused here."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """The value.

    Raises:
        ValueError: not JSON, nested too deeply, or an object that has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:50]!r} is there twice; drop one")
        found[key] = value
    return found
