"""What each option is for: the texts below the fields of :class:`CompactionConfig`.

For ``--help=kv-compaction-config`` and the documentation's page of options.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from dataclasses import dataclass, fields

from vllm_am.config.options import CompactionConfig


@dataclass(frozen=True)
class OptionHelp:
    """One option, for users.

    Attributes:
        name: its key in ``--kv-compaction-config``.
        default: as JSON.
        text: what it does; markdown, one line.
    """

    name: str
    default: str
    text: str


def option_help() -> list[OptionHelp]:
    """All options, in the order of the class."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(CompactionConfig))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in itertools.pairwise(definition.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return [
        OptionHelp(field.name, json.dumps(field.default), texts[field.name])
        for field in fields(CompactionConfig)
    ]
