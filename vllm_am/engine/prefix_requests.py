"""What front ends ask the engine core of named prefixes, and how it declines.

Asked through the method :data:`UTILITY` of ``EngineCore``, with an action and its arguments;
answered in JSON's types, since answers travel between processes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

#: Of ``EngineCore``: the method that front ends call.
UTILITY = "kv_compaction_prefixes"

#: What is told to whoever asked.
Answer = dict[str, Any]


class Refusal(StrEnum):
    """Why something that was asked of named prefixes is not done."""

    UNKNOWN = "unknown"
    TAKEN = "taken"
    NO_ROOM = "no-room"
    WRONG = "wrong"
    OFF = "off"


class PrefixRefused(Exception):
    """It is not done; nothing has changed."""

    def __init__(self, why: Refusal, says: str) -> None:
        super().__init__(says)
        self.why = why


def refusal(why: Refusal, says: str) -> Answer:
    """What is answered in place of a description."""
    return {"refused": why.value, "says": says}
