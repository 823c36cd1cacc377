"""What the documentation says of the code, written by the code: hooks of MkDocs.

A line ``<!-- generated: NAME -->`` of a page is replaced by what :data:`GENERATED` makes. vLLM
has to be installed: the tables come from the modules that use it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def _table(*rows: tuple[str, ...]) -> str:
    """Markdown; the first row is the head."""
    head, *body = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _options() -> str:
    from vllm_am.config.option_help import option_help

    rows = ((f"`{o.name}`", f"`{o.default}`", o.text) for o in option_help())
    return _table(("option", "default", ""), *rows)


def _models() -> str:
    from vllm_am.engine.families import table

    return table()


def _refusals() -> str:
    from vllm_am.engine.capabilities import PLATFORM_REFUSALS, REFUSALS

    rows = ((refusal.name, refusal.fix) for refusal in (*PLATFORM_REFUSALS, *REFUSALS))
    return _table(("not supported yet", "what to do"), *rows)


def _metrics() -> str:
    from vllm_am.engine.frontend.metrics import described

    rows = ((f"`{name}`", kind, text) for name, kind, text in described())
    return _table(("metric", "", ""), *rows)


def _alerts() -> str:
    groups = yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    rows = (
        (f"`{r['alert']}`", r["annotations"]["summary"], r["annotations"]["description"])
        for r in rules
    )
    return _table(("alert", "when", "what to do"), *rows)


def _examples() -> str:
    def first_line(path: Path) -> str:
        text = path.read_text()
        if path.suffix == ".py":
            return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
        return text.splitlines()[1].removeprefix("# ")

    files = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh"))
    rows = ((f"`examples/{path.name}`", first_line(path)) for path in files)
    return _table(("file", ""), *rows)


#: By the name that a page gives.
GENERATED: dict[str, Callable[[], str]] = {
    "options": _options,
    "models": _models,
    "refusals": _refusals,
    "metrics": _metrics,
    "alerts": _alerts,
    "examples": _examples,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for each page."""
    return re.sub(
        r"^<!-- generated: (\w+) -->$",
        lambda match: GENERATED[match[1]](),
        markdown,
        flags=re.MULTILINE,
    )
