"""Results of the suite: a CSV and a Markdown table each, with the machine and the command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from csv import DictWriter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import machine_line

Row = dict[str, object]


@dataclass(frozen=True)
class Report:
    """One table; its rows may be made while it is written."""

    name: str
    title: str
    rows: Iterable[Row]
    notes: Sequence[str] = ()

    def write(self, folder: Path, command: str | None = None, csv: bool = True) -> list[Row]:
        """``<name>.csv`` (unrounded) and ``<name>.md``, again after each row: what ends this
        process early leaves the rows there were.

        Args:
            command: what the user typed; None for this process's own command line.
            csv: False for the Markdown table alone.

        Returns:
            the rows.
        """
        folder.mkdir(parents=True, exist_ok=True)
        head = [f"# {self.title}", "", f"`{command or command_line()}`, {machine_line()}.", ""]
        rows: list[Row] = []
        for row in self.rows:
            rows.append(row)
            columns = list(dict.fromkeys(key for row in rows for key in row))
            if csv:
                with (folder / f"{self.name}.csv").open("w", newline="") as file:
                    writer = DictWriter(file, columns)
                    writer.writeheader()
                    writer.writerows(rows)
            lines = [*head, f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            for each in rows:
                lines.append(f"| {' | '.join(_cell(each.get(c, '')) for c in columns)} |")
            lines += [line for note in self.notes for line in ("", note)]
            (folder / f"{self.name}.md").write_text("\n".join(lines) + "\n")
        return rows


def command_line() -> str:
    """Of this process, ready to be pasted into a shell."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "?").removesuffix(".__main__")
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
