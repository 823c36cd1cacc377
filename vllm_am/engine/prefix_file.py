"""Compacted prefixes in files: what is in one, and what of it is believed.

A safetensors file. Its metadata says what it was made for (:class:`PrefixHeader`, as JSON); its
tensors are ``token_ids``, int32 [tokens], and by KV head, called ``L0H0`` as in budgets files:
``protected.L0H0.keys`` and ``.values``, [start of the first span, D], exact; and of every span
``0.L0H0.keys`` and ``.values``, [slots, D], and ``0.L0H0.bias``, float32 [slots]. No page, block or
hash is in it: those are an engine's own, so that one with other blocks or ranks can load it.

Workers write their own heads to parts, of which the engine core makes one file; and read only
theirs. Nothing here is unpickled, and a file is taken apart only after all of its names, shapes and
types are what the header says. It holds the text and its KV: whoever may read it may read both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT, FORMAT_VERSION = "vllm-am compacted prefix", "1"
TOKEN_IDS = "token_ids"
#: What the exact tokens in front of the first span are called in place of a span's number.
PROTECTED = "protected"

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class PrefixFileError(ValueError):
    """A file that is not loaded; the message names it and what is wrong with it."""


@dataclass(frozen=True)
class PrefixHeader:
    """What a file says of itself."""

    model: str
    """What it was called; not compared."""
    model_digest: str
    """Of its configuration and weights: ``identity.py``."""
    dtype: str
    """Of keys and values, by PyTorch's name."""
    heads: tuple[str, ...]
    """KV heads that are compacted."""
    head_dim: int
    options: Mapping[str, Any]
    """That shape a fit."""
    ratio: float
    salt: str | None
    """The cache salt of the requests that it is for; None: of those without one."""
    spans: tuple[tuple[int, int], ...]
    """Tokens [start, end), each span from where the last one ends."""
    plugin: str
    """Version of vllm-am; not compared."""

    @property
    def start(self) -> int:
        """Exact tokens in front of the first span."""
        return self.spans[0][0]

    @property
    def tokens(self) -> int:
        """Of the whole text."""
        return self.spans[-1][1]

    @property
    def names(self) -> Iterator[str]:
        """What the tensors of a head are filed under: the protected tokens, then the spans."""
        yield PROTECTED
        yield from map(str, range(len(self.spans)))

    def to_metadata(self) -> dict[str, str]:
        """As safetensors holds it: texts only."""
        return {"format": FORMAT, "version": FORMAT_VERSION, "header": json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> PrefixHeader:
        """Raises :class:`PrefixFileError`, without the file's name, for what is no such header."""
        metadata = metadata or {}
        if metadata.get("format") != FORMAT:
            raise PrefixFileError("is no compacted prefix")
        if metadata.get("version") != FORMAT_VERSION:
            raise PrefixFileError(
                f"version: is {str(metadata.get('version'))[:20]!r}, and this vllm-am reads "
                f"{FORMAT_VERSION!r}: make the file again"
            )
        try:
            found = json.loads(metadata["header"])
            return cls._checked(found)
        except PrefixFileError:
            raise
        except Exception as error:  # whatever somebody has put there
            raise PrefixFileError(f"header: cannot be read ({type(error).__name__})") from None

    @classmethod
    def _checked(cls, found: dict[str, Any]) -> PrefixHeader:
        if set(found) != {f.name for f in fields(cls)}:
            raise PrefixFileError("header: has other fields than it should")
        expected = {
            "model": str,
            "model_digest": str,
            "dtype": str,
            "heads": list,
            "head_dim": int,
            "options": dict,
            "ratio": float,
            "salt": str | None,
            "spans": list,
            "plugin": str,
        }
        for name, kind in expected.items():
            if not isinstance(found[name], kind) or isinstance(found[name], bool):
                raise PrefixFileError(f"{name}: is of another type than it should be")
        spans = tuple((int(start), int(end)) for start, end in found["spans"])
        ends = [end for _, end in spans]
        in_order = all(start < end for start, end in spans) and bool(spans)
        if not in_order or [s for s, _ in spans] != [spans[0][0], *ends[:-1]] or spans[0][0] < 0:
            raise PrefixFileError("spans: do not follow one another")
        heads = tuple(map(str, found["heads"]))
        if len(set(heads)) != len(heads) or not heads:
            raise PrefixFileError("heads: are none, or not all different")
        if not 0 < found["ratio"] <= 1 or not math.isfinite(found["ratio"]):
            raise PrefixFileError("ratio: is not in (0, 1]")
        if found["dtype"] not in _DTYPES:
            raise PrefixFileError(f"dtype: is not one of {', '.join(_DTYPES)}")
        return cls(**{**found, "spans": spans, "heads": heads})


@dataclass(frozen=True)
class PrefixFile:
    """A file whose names, shapes and types are what they should be; its numbers are not looked at.

    Attributes:
        slots: by span and head, in the header's order.
    """

    path: Path
    header: PrefixHeader
    token_ids: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, path: Path) -> PrefixFile:
        """Raises :class:`PrefixFileError`, naming the file and the field that is wrong."""
        with _opened(path) as file:
            header = PrefixHeader.from_metadata(file.metadata())
            shapes = {}
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                shapes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
            slots = tuple(
                tuple(_slots_of(shapes, header, name, head) for head in header.heads)
                for name in header.names
            )
            if shapes.pop(TOKEN_IDS, None) != ((header.tokens,), "I32"):
                raise PrefixFileError(f"{TOKEN_IDS}: are not those of {header.tokens} tokens")
            if shapes:
                raise PrefixFileError(f"{sorted(shapes)[0][:60]}: should not be there")
            ids = file.get_tensor(TOKEN_IDS).tolist()
            return cls(path, header, tuple(ids), slots[1:])

    def check(self, expected: PrefixHeader, vocabulary: int, any_options: bool) -> None:
        """Whether it was made for this engine.

        Args:
            expected: what a file of this engine would say, but for text, ratio and spans.
            any_options: it may have been compacted with other options.

        Raises:
            PrefixFileError: naming the first field that differs.
        """
        for name in ("model_digest", "dtype", "head_dim", "heads"):
            if getattr(self.header, name) != getattr(expected, name):
                raise PrefixFileError(
                    f"{self.path}: {name}: it was made with {_short(getattr(self.header, name))} "
                    f"({_short(self.header.model)}), and this engine has "
                    f"{_short(getattr(expected, name))}; make it anew with `vllm-am compact`"
                )
        theirs, ours = self.header.options, expected.options
        other = sorted(
            name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
        )
        if other and not any_options:
            raise PrefixFileError(
                f"{self.path}: options: it was compacted with {other[0]}="
                f"{_short(theirs.get(other[0]))}, and this engine has "
                f"{_short(ours.get(other[0]))}; make it anew, or accept it with "
                'load_any_options in --kv-compaction-config ("force" over HTTP)'
            )
        if not all(0 <= token < vocabulary for token in self.token_ids):
            raise PrefixFileError(
                f"{self.path}: {TOKEN_IDS}: are not all of the model's vocabulary"
            )

    def read_heads(self, name: str, heads: Iterable[str]) -> list[dict[str, torch.Tensor]]:
        """The tensors of some heads: ``keys``, ``values`` [n, D] and, of spans, ``bias`` [n].

        Args:
            name: one of ``header.names``.

        Raises:
            PrefixFileError: the file is not what it was any more, or a number is not finite.
        """
        parts = ("keys", "values") if name == PROTECTED else ("keys", "values", "bias")
        with _opened(self.path) as file:
            if PrefixHeader.from_metadata(file.metadata()) != self.header:
                raise PrefixFileError("has changed since it was checked")
            found = []
            for head in heads:
                tensors = {part: file.get_tensor(f"{name}.{head}.{part}") for part in parts}
                for part, tensor in tensors.items():
                    if not bool(tensor.isfinite().all()):
                        raise PrefixFileError(f"{name}.{head}.{part}: is not finite")
                found.append(tensors)
            return found


def _slots_of(shapes: dict[str, Any], header: PrefixHeader, name: str, head: str) -> int:
    """How many slots a head has in a span; takes its tensors out of ``shapes``."""
    keys, dtype = f"{name}.{head}.keys", _DTYPES[header.dtype]
    shape = shapes.get(keys, ((), ""))[0]
    count = shape[0] if shape else -1
    expected: dict[str, Any] = {keys: ((count, header.head_dim), dtype)}
    expected[f"{name}.{head}.values"] = expected[keys]
    if name == PROTECTED:
        least, most = header.start, header.start
    else:
        expected[f"{name}.{head}.bias"] = ((count,), "F32")
        start, end = header.spans[int(name)]
        least, most = 0, end - start
    for tensor, what in expected.items():
        if shapes.pop(tensor, None) != what or not least <= count <= most:
            raise PrefixFileError(f"{tensor}: is not there, or of another shape or type")
    return int(count)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file; whatever is wrong with it is a :class:`PrefixFileError` that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except PrefixFileError as error:
        raise PrefixFileError(f"{path}: {error}") from None
    except (OSError, SafetensorError) as error:
        raise PrefixFileError(f"{path}: cannot be read ({str(error)[:200]})") from None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def part_path(path: Path, transfer: str, name: str, rank: int) -> Path:
    """Where a rank writes its heads of a part of a file that is going to be ``path``."""
    return path.with_name(f".{path.name}.{transfer}.{name}.{rank}")


def write_part(path: Path, name: str, heads: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """One rank's heads of one part.

    Args:
        name: one of ``PrefixHeader.names``.
        heads: tensors by head, as :meth:`PrefixFile.read_heads` returns them.
    """
    tensors = {
        f"{name}.{head}.{part}": tensor.contiguous()
        for head, parts in heads.items()
        for part, tensor in parts.items()
    }
    save_file(tensors, path)


def join_parts(path: Path, header: PrefixHeader, token_ids: Sequence[int], transfer: str) -> None:
    """Make the file of all ranks' parts, which are deleted; nobody ever sees half of it.

    Raises:
        PrefixFileError, OSError: there is a part missing, no room, no permission.
    """
    tensors = {TOKEN_IDS: torch.tensor(token_ids[: header.tokens], dtype=torch.int32)}
    for part in parts_of(path, transfer):
        with _opened(part) as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    whole = part_path(path, transfer, "whole", 0)
    save_file(tensors, whole, header.to_metadata())
    PrefixFile.read(whole)
    os.replace(whole, path)
    delete_parts(path, transfer)


def parts_of(path: Path, transfer: str) -> list[Path]:
    """All files of an unfinished one."""
    return [
        each for each in path.parent.iterdir() if each.name.startswith(f".{path.name}.{transfer}.")
    ]


def delete_parts(path: Path, transfer: str) -> None:
    """Of one that is finished, or never will be."""
    for part in parts_of(path, transfer):
        part.unlink(missing_ok=True)
