"""The table of contacts with vLLM is true: against our code, and against the installed vLLM."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from scripts.check_vllm import ENGINE, imported, our_classes
from vllm_am.engine.contacts import Contact, How, contacts

CONTACTS = contacts()
TABLE = {contact.symbol: contact for contact in CONTACTS}
#: What marks a class as wrapped already is ours, not vLLM's.
OUR_MARKS = {"_kv_compaction_installed"}


@dataclass
class Use:
    """What the code does with one symbol of vLLM."""

    where: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)
    """Attributes that are assigned to on it."""
    subclasses: list[ast.ClassDef] = field(default_factory=list)
    """Ours, over one another, down to the symbol."""


@cache
def uses() -> dict[str, Use]:
    """By symbol (without ``vllm.``), as the syntax trees of ``vllm_am/engine`` say."""
    found: dict[str, Use] = defaultdict(Use)
    for path in sorted(ENGINE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = dict(imported(tree))
        for symbol in names.values():
            found[symbol].where.add(str(path.relative_to(ENGINE)))
        for node in ast.walk(tree):
            for target in getattr(node, "targets", ()):
                owner = getattr(target, "value", None)
                if isinstance(owner, ast.Name) and owner.id in names:
                    found[names[owner.id]].replaced |= {target.attr} - OUR_MARKS
    for symbol, classes in our_classes().items():
        found[symbol].subclasses += classes
    return found


def resolve(symbol: str) -> Any:
    """The object of the installed vLLM."""
    module, _, name = f"vllm.{symbol}".rpartition(".")
    try:
        return importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


def defined(node: ast.ClassDef) -> set[str]:
    """Names in a class body."""
    found = set()
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            found.add(item.name)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found.add(item.target.id)
        elif isinstance(item, ast.Assign):
            found |= {t.id for t in item.targets if isinstance(t, ast.Name)}
    return found


def of_self(node: ast.ClassDef) -> tuple[set[str], set[str]]:
    """Attributes of ``self`` that a class reads, and those that it sets."""
    read, written = set(), set()
    for item in ast.walk(node):
        if isinstance(item, ast.Attribute) and getattr(item.value, "id", None) == "self":
            (written if isinstance(item.ctx, ast.Store) else read).add(item.attr)
    return read, written


def test_every_import_from_vllm_is_in_the_table():
    in_code = {symbol: use.where for symbol, use in uses().items()}
    assert in_code == {symbol: set(contact.where) for symbol, contact in TABLE.items()}


def test_every_contact_says_why():
    for contact in CONTACTS:
        assert contact.why, contact.symbol
        name = contact.symbol.rpartition(".")[2]
        private = name.startswith("_") and not name.startswith("__")
        if contact.how is How.REPLACED or private:
            assert contact.until, f"{contact.symbol}: private or replaced, so until when?"


def test_what_is_replaced_is_in_the_table():
    replaced = {symbol: use.replaced for symbol, use in uses().items() if use.replaced}
    in_table = {c.symbol: set(c.members) for c in CONTACTS if c.how is How.REPLACED and c.members}
    assert replaced == in_table


SUBCLASSED = [contact for contact in CONTACTS if contact.how is How.SUBCLASSED]


def test_what_is_subclassed_is_in_the_table():
    assert {s for s, use in uses().items() if use.subclasses} == {c.symbol for c in SUBCLASSED}


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("contact", CONTACTS, ids=lambda contact: contact.symbol)
def test_vllm_has_it(contact: Contact):
    """Also what we replace in it."""
    found = resolve(contact.symbol)
    if contact.how is How.REPLACED:
        assert all(hasattr(found, name) for name in contact.members)


def families() -> Iterator[tuple[list[Contact], list[ast.ClassDef]]]:
    """Contacts that classes of ours have in common (a mixin, and what it is mixed into)."""
    todo = {contact.symbol for contact in SUBCLASSED}
    while todo:
        family, grown = set(), {min(todo)}
        while grown:
            family |= grown
            todo -= grown
            nodes = [node for symbol in family for node in uses()[symbol].subclasses]
            grown = {s for s in todo for node in uses()[s].subclasses if node in nodes}
        yield [TABLE[symbol] for symbol in sorted(family)], nodes


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("family", list(families()), ids=lambda family: family[0][0].symbol)
def test_overrides_and_uses_are_in_the_table(family: tuple[list[Contact], list[ast.ClassDef]]):
    """What our classes define and vLLM's have is overridden; what ours use of themselves and
    neither define nor set is vLLM's."""
    table, ours = family
    theirs = [cls for c in table for cls in resolve(c.symbol).__mro__ if in_vllm(cls)]
    names = set().union(*map(defined, ours))
    overridden = {name for name in names for cls in theirs if name in vars(cls)}
    assert overridden == {name for c in table for name in c.members}
    read, written = (set().union(*found) for found in zip(*map(of_self, ours), strict=True))
    own = names | {name for name in written if not sets(theirs, name)}
    relied_on = (read | written) - own
    assert relied_on == {name for c in table for name in c.uses}
    missing = {name for name in relied_on if not sets(theirs, name)}
    assert not missing, "vLLM does not have it (any more)"


def in_vllm(cls: type) -> bool:
    return cls.__module__.startswith("vllm.")


def sets(classes: list[type], name: str) -> bool:
    """Whether one of the classes defines an attribute, or sets it on its instances."""
    pattern = re.compile(rf"self\.{name}\b[^=\n]*=[^=]|^    (def )?{name}\b", re.MULTILINE)
    return any(pattern.search(inspect.getsource(cls)) for cls in classes)
