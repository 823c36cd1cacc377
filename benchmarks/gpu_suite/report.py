"""Results of the suite: a CSV and a Markdown table each, with the machine and the command."""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import machine_line

Row = dict[str, object]


@dataclass(frozen=True)
class Report:
    """One table."""

    name: str
    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def write(self, folder: Path, command: str | None = None) -> None:
        """``<name>.csv`` (unrounded) and ``<name>.md``.

        Args:
            command: what the user typed; None for this process's own command line.
        """
        folder.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with (folder / f"{self.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        lines = [f"# {self.title}", "", f"`{command or command_line()}`, {machine_line()}.", ""]
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        for row in self.rows:
            lines.append(f"| {' | '.join(_cell(row.get(c, '')) for c in columns)} |")
        lines += [line for note in self.notes for line in ("", note)]
        (folder / f"{self.name}.md").write_text("\n".join(lines) + "\n")


def command_line() -> str:
    """Of this process, ready to be pasted into a shell."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "?").removesuffix(".__main__")
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
