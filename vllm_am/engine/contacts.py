"""Every contact with vLLM: the symbol, how it is touched, where, why, and until when.

The table itself is ``contacts.toml``, written for the versions of vLLM that ``versions.py`` names.
``tests/engine/test_contacts.py`` holds it against our code (what is imported, subclassed,
overridden, replaced) and against the installed vLLM (that it has all of it): no entry is missing,
and none is stale. Imports no vLLM.

``python -m vllm_am.engine.contacts`` prints it.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

TABLE = Path(__file__).with_suffix(".toml")


class How(StrEnum):
    """From the closest contact to the loosest."""

    REPLACED = "attributes replaced"
    SUBCLASSED = "subclassed"
    REGISTERED = "extension point"
    CALLED = "called"
    READ = "read"


@dataclass(frozen=True)
class Contact:
    """One symbol of vLLM."""

    symbol: str
    """Dotted path below ``vllm``."""
    how: How
    where: tuple[str, ...]
    """Files of ``vllm_am/engine`` that name it."""
    why: str
    members: tuple[str, ...] = ()
    """Attributes of it that are replaced or overridden."""
    uses: tuple[str, ...] = ()
    """Of a class that is subclassed: other attributes of its instances that our code relies on."""
    until: str = ""
    """When the contact can go; nothing where it is a public interface."""


def contacts() -> list[Contact]:
    """The table, by room."""
    entries = tomllib.loads(TABLE.read_text())
    return [
        Contact(
            symbol,
            How(entry["how"]),
            tuple(entry["where"]),
            " ".join(entry["why"].split()),
            tuple(entry.get("members", ())),
            tuple(entry.get("uses", ())),
            " ".join(entry.get("until", "").split()),
        )
        for symbol, entry in entries.items()
    ]


def main() -> None:
    """Print the table, in rows of tab-separated fields."""
    for contact in contacts():
        fields = (f"vllm.{contact.symbol}", contact.how, " ".join(contact.where), contact.why)
        print("\t".join(fields))


if __name__ == "__main__":
    main()
