"""README and the pages of the documentation, and the commands that they show."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:vllm-am|vllm serve|make) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block; lines that a snippet of ``examples/`` fills in are left out."""

    page: Path
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    """Of all pages."""
    found = []
    for page in PAGES:
        for indent, language, text in _FENCE.findall(page.read_text()):
            lines = [line.removeprefix(indent) for line in text.splitlines()]
            lines = [line for line in lines if not line.startswith("--8<--")]
            if language in languages and any(lines):
                found.append(Block(page, language, "\n".join(lines)))
    return found


def commands() -> list[list[str]]:
    """Words of every command that a reader is shown, but for those of whole scripts (bash)."""
    lines = [
        line.removeprefix("$ ")
        for block in blocks("console")
        for line in block.text.splitlines()
        if line.startswith("$ ")
    ]
    lines += [text for page in PAGES for text in _INLINE.findall(page.read_text())]
    return [shlex.split(line, comments=True) for line in lines]
