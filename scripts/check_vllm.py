"""Would this tree work with another version of vLLM? Its Python files are enough to say.

    python -m scripts.check_vllm 0.34.0

Fetches the Python files of that version's wheel in which our contacts are defined
(``vllm_am/engine/contacts.toml``), a few hundred KB, and holds every contact against their syntax
trees: whether the symbol and what we replace, override or use of it is there; whether our classes
define all that is abstract in it; whether our overrides accept what theirs accept; how signatures
and declared types differ from those of the installed version. Exit status 0: nothing would break,
as far as names and signatures tell; 1: something would. Nothing of that version is installed,
imported or run.

The files are kept in ``~/.cache/vllm-am/vllm/VERSION`` (or below $XDG_CACHE_HOME). The index is
PyPI, or $PIP_INDEX_URL.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import json
import os
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

import vllm_am.engine
from vllm_am.engine.contacts import Contact, How, contacts

ENGINE = Path(vllm_am.engine.__file__).parent

#: Bytes that are fetched at once: most files are smaller, and so is the wheel's directory.
_BLOCK = 1 << 16


class Unreachable(RuntimeError):
    """The index does not answer, or has no such version."""


class Sources(Protocol):
    """The Python files of one version."""

    def read(self, path: str) -> str | None:
        """The text of ``vllm/...``; None if there is no such file."""


class InstalledSources:
    """Of the vLLM of this environment."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise Unreachable("vLLM is not installed")
        self._root = Path(next(iter(spec.submodule_search_locations))).parent

    def read(self, path: str) -> str | None:
        file = self._root / path
        return file.read_text() if file.is_file() else None


class WheelSources:
    """Of a version on the index, file by file, kept in a folder.

    Raises:
        Unreachable: see there.
    """

    def __init__(self, version: str, folder: Path | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._version = version
        self._folder = folder or home / "vllm-am" / "vllm" / version
        self._absent = self._folder / "absent.json"

    def read(self, path: str) -> str | None:
        file = self._folder / path
        if file.is_file():
            return file.read_text()
        absent = json.loads(self._absent.read_text()) if self._absent.is_file() else []
        if path in absent:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        if path not in self._names:
            self._absent.write_text(json.dumps([*absent, path]))
            return None
        text = self._wheel.read(path).decode()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return text

    @cached_property
    def _wheel(self) -> zipfile.ZipFile:
        index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
        accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{index}/vllm/", headers=accept), timeout=30
            ) as answer:
                files = json.load(answer)["files"]
            prefix, suffix = f"vllm-{self._version}-", "x86_64.whl"
            urls = [f["url"] for f in files if f["filename"].startswith(prefix)]
            urls = [url for url in urls if url.endswith(suffix)]
            if not urls:
                raise Unreachable(f"{index} has no wheel of vLLM {self._version} for x86-64")
            return zipfile.ZipFile(io.BufferedReader(_Remote(urls[0]), _BLOCK))  # type: ignore[type-var]
        except (urllib.error.URLError, TimeoutError, ValueError) as error:
            raise Unreachable(f"{index}: {error}") from error

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self._wheel.namelist())


class _Remote(io.RawIOBase):
    """A file on a server, read by ranges: a wheel of 300 MB is not needed for 1 MB of Python."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._place = 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30) as head:
            self._size = int(head.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        last = min(self._place + len(buffer), self._size) - 1
        if last < self._place:
            return 0
        request = urllib.request.Request(
            self._url, headers={"Range": f"bytes={self._place}-{last}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            data = answer.read()
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


@dataclass
class Found:
    """A definition: its node, the module that it is in, as a path."""

    node: ast.AST
    path: str


class Version:
    """The syntax trees of one version."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self.tree = cache(self._tree)

    def _tree(self, path: str) -> ast.Module | None:
        text = self._sources.read(path)
        return None if text is None else ast.parse(text)

    def module(self, dotted: str) -> str | None:
        """The file of ``vllm.a.b``."""
        base = dotted.replace(".", "/")
        for path in (f"{base}.py", f"{base}/__init__.py"):
            if self.tree(path) is not None:
                return path
        return None

    def find(self, symbol: str) -> Found | None:
        """The definition behind a dotted path below ``vllm``, through re-exports."""
        dotted = f"vllm.{symbol}"
        if (path := self.module(dotted)) is not None:
            tree = self.tree(path)
            assert tree is not None
            return Found(tree, path)
        module, _, name = dotted.rpartition(".")
        path = self.module(module)
        return None if path is None else self._in_module(path, name)

    def _in_module(self, path: str, name: str, depth: int = 0) -> Found | None:
        tree = self.tree(path)
        if tree is None or depth > 8:
            return None
        for node in statements(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name == name:
                    return Found(node, path)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._through(path, node, alias.name, depth)
                    if alias.name == "*" and (found := self._through(path, node, name, depth)):
                        return found
            elif name in assigned(node):
                return Found(node, path)
        # What a module makes when it is asked for (``__getattr__``): a table of names.
        lazy = any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body)
        if lazy:
            for part in ast.walk(tree):
                if isinstance(part, ast.Constant) and part.value == name:
                    return Found(part, path)
        return None

    def _through(self, path: str, node: ast.ImportFrom, name: str, depth: int) -> Found | None:
        """Follow ``from module import name``, written in the file ``path``."""
        module = node.module or ""
        if node.level:
            package = path.removesuffix("/__init__.py").split("/")
            if not path.endswith("/__init__.py"):
                package = path.split("/")[:-1]
            package = package[: len(package) - (node.level - 1)]
            module = ".".join([*package, *filter(None, [module])])
        if not module.startswith("vllm"):
            return Found(node, path)  # of another package: its matter
        if (below := self.module(f"{module}.{name}")) is not None:
            tree = self.tree(below)
            assert tree is not None
            return Found(tree, below)
        file = self.module(module)
        return None if file is None else self._in_module(file, name, depth + 1)

    def lineage(self, found: Found) -> list[ast.ClassDef]:
        """A class and those of vLLM's that it is built on, itself first."""
        if not isinstance(found.node, ast.ClassDef):
            return []
        line = [found.node]
        for base in found.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                above = self._in_module(found.path, base.id)
                if above is not None:
                    line += [node for node in self.lineage(above) if node not in line]
        return line


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Of a module, those under conditions included."""
    todo = list(tree.body)
    while todo:
        node = todo.pop(0)
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try):
                todo += getattr(node, part, [])
        if isinstance(node, ast.Try):
            todo += [statement for handler in node.handlers for statement in handler.body]


def assigned(node: ast.AST) -> set[str]:
    """Names that a statement gives a value."""
    if isinstance(node, ast.AnnAssign):
        return {node.target.id} if isinstance(node.target, ast.Name) else set()
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def member(line: list[ast.ClassDef], name: str) -> ast.AST | None:
    """What classes (the first wins) define by a name, in their bodies or on ``self``."""
    for cls in line:
        for node in cls.body:
            if getattr(node, "name", None) == name or name in assigned(node):
                return node
        for part in ast.walk(cls):
            if (
                isinstance(part, ast.Attribute)
                and isinstance(part.ctx, ast.Store)
                and part.attr == name
                and isinstance(part.value, ast.Name)
                and part.value.id == "self"
            ):
                return part
    return None


def declared(line: list[ast.ClassDef], name: str) -> str | None:
    """The type that classes (the first wins) declare an attribute with."""
    for cls in line:
        for node in ast.walk(cls):
            if isinstance(node, ast.AnnAssign) and (
                getattr(node.target, "attr", getattr(node.target, "id", None)) == name
            ):
                return ast.unparse(node.annotation)
    return None


def abstract(line: list[ast.ClassDef]) -> set[str]:
    """Methods that classes leave to be defined below them."""
    left: set[str] = set()
    for cls in reversed(line):
        for node in cls.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                marks = {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}
                left.discard(node.name)
                if "abstractmethod" in marks:
                    left.add(node.name)
            else:
                left -= assigned(node)
    return left


@dataclass(frozen=True)
class Signature:
    """Of a function, without ``self``: what may be passed to it."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    required: frozenset[str]
    rest: bool
    named_rest: bool

    @classmethod
    def of(cls, node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> Signature:
        static = any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
        places = [*node.args.posonlyargs, *node.args.args]
        names = [argument.arg for argument in places][int(method and not static) :]
        keywords = [argument.arg for argument in node.args.kwonlyargs]
        optional = names[len(names) - len(node.args.defaults) :] if node.args.defaults else []
        given = [
            name
            for name, default in zip(keywords, node.args.kw_defaults, strict=True)
            if default is not None
        ]
        return cls(
            tuple(names),
            tuple(keywords),
            frozenset({*names, *keywords} - {*optional, *given}),
            node.args.vararg is not None,
            node.args.kwarg is not None,
        )

    def accepts(self, other: Signature) -> bool:
        """Whether it can be called in every way in which ``other`` can, with as much or less."""
        places = len(other.positional)
        if places > len(self.positional) and not self.rest and not self.named_rest:
            return False
        if {*other.keywords} - {*self.positional, *self.keywords} and not self.named_rest:
            return False
        return self.required <= {*self.positional[:places], *other.positional, *other.keywords}

    def __str__(self) -> str:
        words = [name if name in self.required else f"{name}=" for name in self.positional]
        words += ["*rest"] if self.rest else ["*"] if self.keywords else []
        words += [name if name in self.required else f"{name}=" for name in self.keywords]
        words += ["**rest"] if self.named_rest else []
        return f"({', '.join(words)})"


@dataclass
class Verdict:
    """On one contact: what would break, and what is merely worth a look."""

    contact: Contact
    breaks: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name in this module, symbol) of everything that is imported from vLLM."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            top, _, below = node.module.partition(".")
            if top == "vllm":
                for alias in node.names:
                    yield alias.asname or alias.name, f"{below}.{alias.name}".strip(".")


@cache
def our_classes() -> dict[str, list[ast.ClassDef]]:
    """By symbol of vLLM that they are built on, possibly through one another."""
    classes: list[tuple[ast.ClassDef, dict[str, str]]] = []
    for path in sorted(ENGINE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = dict(imported(tree))
        classes += [(n, names) for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    by_name = {node.name: (node, names) for node, names in classes}

    def above(node: ast.ClassDef, names: dict[str, str]) -> Iterator[str]:
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            name = base.id if isinstance(base, ast.Name) else ""
            if name in names:
                yield names[name]
            elif name in by_name and by_name[name][0] is not node:
                yield from above(*by_name[name])

    found: dict[str, list[ast.ClassDef]] = {}
    for node, names in classes:
        for symbol in above(node, names):
            found.setdefault(symbol, []).append(node)
    return found


def judge(contact: Contact, theirs: Version, known: Version) -> Verdict:
    """Hold one contact against a version, and against one that is known to work."""
    verdict = Verdict(contact)
    found = theirs.find(contact.symbol)
    if found is None:
        verdict.breaks.append("is not there")
        return verdict
    line, before = theirs.lineage(found), known.find(contact.symbol)
    old = known.lineage(before) if before is not None else []
    for name in (*contact.members, *contact.uses):
        if line and member(line, name) is None and not _relatives_have(contact, name, theirs):
            verdict.breaks.append(f"has no {name}")
    if isinstance(found.node, ast.FunctionDef) and isinstance(
        getattr(before, "node", None), ast.FunctionDef
    ):
        assert before is not None and isinstance(before.node, ast.FunctionDef)
        _compare(verdict, "", found.node, before.node, method=False)
    for name in contact.uses:
        now, then = declared(line, name), declared(old, name)
        if now and then and now != then:
            verdict.differs.append(f"{name} was {then}, and is {now}")
    for name in contact.members:
        ours, before_node = member(line, name), member(old, name)
        if isinstance(ours, ast.FunctionDef) and isinstance(before_node, ast.FunctionDef):
            _compare(verdict, name, ours, before_node, method=True, called=False)
    if contact.how is How.SUBCLASSED:
        _judge_subclasses(verdict, line, old)
    return verdict


def _relatives_have(contact: Contact, name: str, theirs: Version) -> bool:
    """Whether another class of theirs that a class of ours is built on has it: what is mixed into
    several may rely on what only these have."""
    ours = our_classes()
    mine = ours.get(contact.symbol, [])
    for symbol, classes in ours.items():
        found = theirs.find(symbol) if any(cls in mine for cls in classes) else None
        if found is not None and member(theirs.lineage(found), name) is not None:
            return True
    return False


def _compare(
    verdict: Verdict,
    name: str,
    new: ast.FunctionDef,
    old: ast.FunctionDef,
    *,
    method: bool,
    called: bool = True,
) -> None:
    """A function that we call has to accept what the known one accepts."""
    now, before = Signature.of(new, method), Signature.of(old, method)
    if now == before:
        return
    text = f"{name}{before} is now {name}{now}"
    (verdict.breaks if called and not now.accepts(before) else verdict.differs).append(text)


def _judge_subclasses(verdict: Verdict, line: list[ast.ClassDef], old: list[ast.ClassDef]) -> None:
    """Our classes define what theirs leave open, and accept what theirs accept; what is as it was
    in the version that is known to work does not break."""
    ours = our_classes().get(verdict.contact.symbol, [])
    defined = {
        node.name: node
        for cls in ours
        for node in cls.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    # Mixins are completed by the classes that they are mixed into, which are contacts themselves.
    mixed = any(cls.name.endswith("Mixin") for cls in ours)
    for name in sorted(abstract(line) - defined.keys()):
        if not mixed:
            verdict.breaks.append(f"{name} is abstract, and ours does not define it")
    for name in verdict.contact.members:
        theirs, before = member(line, name), member(old, name)
        if name in defined and isinstance(theirs, ast.FunctionDef):
            mine, its = Signature.of(defined[name], True), Signature.of(theirs, True)
            same = isinstance(before, ast.FunctionDef) and Signature.of(before, True) == its
            if not same and not mine.accepts(its):
                verdict.breaks.append(f"{name}{its} is overridden by {name}{mine}")


def check(theirs: Version, known: Version) -> list[Verdict]:
    """All contacts, held against a version and one that is known to work."""
    return [judge(contact, theirs, known) for contact in contacts()]


def main() -> int:
    """Print what would break, and what differs; 1 if anything would break, 2 without an answer."""
    parser = argparse.ArgumentParser(prog="python -m scripts.check_vllm", description=__doc__)
    parser.add_argument("version", help="as on the package index, such as 0.34.0")
    version = parser.parse_args().version
    try:
        verdicts = check(Version(WheelSources(version)), Version(InstalledSources()))
    except Unreachable as error:
        print(f"vLLM {version}: {error}", file=sys.stderr)
        return 2
    table = Table(title=f"vLLM {version}: {len(verdicts)} contacts")
    for column in ("symbol", "would break", "differs"):
        table.add_column(column)
    for verdict in verdicts:
        if verdict.breaks or verdict.differs:
            table.add_row(
                verdict.contact.symbol, "\n".join(verdict.breaks), "\n".join(verdict.differs)
            )
    Console().print(table)
    broken = sum(bool(verdict.breaks) for verdict in verdicts)
    print(f"{broken} of {len(verdicts)} contacts would break")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
