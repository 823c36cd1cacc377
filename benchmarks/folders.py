"""Where results are written: a folder that git ignores, unless they are to be committed.

Trying a benchmark must not change the checkout. So every script writes to ``benchmarks/out/``; with
``--record``, and only then, it replaces the results that are committed and that the documentation
quotes. A place that the user names is taken as it is, and excludes ``--record``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

BENCHMARKS = Path(__file__).parent
#: Committed.
RECORDED = BENCHMARKS / "results"
#: Ignored by git.
UNRECORDED = BENCHMARKS / "out"

#: The options of a script: another folder, or the committed one.
Folder = Annotated[
    Path | None, typer.Option(help="Folder of the results.", show_default="benchmarks/out")
]
Record = Annotated[bool, typer.Option("--record", help="Replace the committed results instead.")]


def result_path(
    named: Path | None, record: bool, below: str = "", recorded: Path | None = None
) -> Path:
    """The folder or file that a script writes; to be called before anything is measured.

    Args:
        named: by the user; None for the default.
        record: write the committed results.
        below: the default's path inside either folder.
        recorded: the committed folder, where it is not ``RECORDED``.

    Raises:
        typer.BadParameter: the user named a place and asked for the committed one.
    """
    if named is not None and record:
        raise typer.BadParameter(
            "it names the committed results, and cannot be combined with --out or --output",
            param_hint="--record",
        )
    if named is not None:
        return named
    return ((recorded or RECORDED) if record else UNRECORDED) / below


def written(folder: Path, *names: str) -> str:
    """What a script says at its end."""
    return f"Written to {os.path.relpath(folder)}: {', '.join(names)}."
