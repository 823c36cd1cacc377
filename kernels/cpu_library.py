"""The CPU kernels of ``csrc/`` as a library: compiled by the machine's own compiler, found again
later.

What was built once is used from then on, also where there is no compiler (images: ``vllm-am build``
builds it ahead). It is named by its source and its flags, so that another version or another CPU
gets one of its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_am.kernels.native import SOURCES

FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
]

#: By torch's name of what this CPU can do.
VECTOR_FLAGS = {
    "AVX512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
    "AVX2": ["-mavx2", "-mfma"],
}

#: What is compiled, and what that includes.
UNITS, HEADERS = ("attend_pages.cpp", "weigh_scores.cpp"), ("cpu.h",)

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ATTEND = (
    *(_POINTER, _POINTER, _NUMBER, _POINTER, _NUMBER, _NUMBER, _NUMBER),
    *(ctypes.c_float, _POINTER),
)
_WEIGH = (_POINTER, _POINTER, _POINTER, _POINTER, _NUMBER, _NUMBER, _NUMBER)
#: Entry points and the types of their arguments; none returns anything.
ENTRY_POINTS: dict[str, tuple[Any, ...]] = {
    "attend_pages_float32": _ATTEND,
    "attend_pages_bfloat16": _ATTEND,
    "weigh_scores_float32": _WEIGH,
}


class Loaded(NamedTuple):
    """The outcome of looking for the library."""

    code: ctypes.CDLL | None
    says: str
    """Where it is, or why there is none."""


def library() -> ctypes.CDLL | None:
    """The compiled code; None where plain torch takes its place, see :func:`load`."""
    return load().code


@functools.cache
def load() -> Loaded:
    """Load the library, which is compiled if need be; once per process."""
    if os.environ.get("VLLM_AM_NATIVE") == "off":
        return Loaded(None, "VLLM_AM_NATIVE=off")
    try:
        code, place = _load_or_build()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        return Loaded(None, reason.strip())
    for name, arguments in ENTRY_POINTS.items():
        function = getattr(code, name)
        function.argtypes, function.restype = arguments, None
    return Loaded(code, f"{torch.backends.cpu.get_cpu_capability()}, {place}")


def cached_library() -> Path:
    """Where the library is kept, whether or not it is there."""
    sources = [(SOURCES / name).read_bytes() for name in (*UNITS, *HEADERS)]
    identity = b"\0".join([*sources, " ".join(_flags()).encode()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vllm-am")
    return cache / f"cpu-{hashlib.sha256(identity).hexdigest()[:16]}.so"


def _flags() -> list[str]:
    return [*FLAGS, *VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])]


def _load_or_build() -> tuple[ctypes.CDLL, str]:
    """The code and where it came from.

    Raises:
        OSError, subprocess.CalledProcessError: there is none, and no working compiler.
    """
    target = cached_library()
    try:
        return ctypes.CDLL(str(target)), str(target)
    except OSError:  # not there, or not whole
        pass
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Workers may come here together: each compiles a file of its own, and the last one stays.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _compile(Path(folder, target.name)).replace(target)
        return ctypes.CDLL(str(target)), str(target)
    except NoCompiler:
        raise
    except (OSError, subprocess.CalledProcessError):
        pass
    # A folder that cannot be written to, or is full. Once loaded, the file itself is not needed.
    with tempfile.TemporaryDirectory(prefix="vllm-am-") as folder:
        built = _compile(Path(folder, target.name))
        return ctypes.CDLL(str(built)), f"a temporary file, as {target.parent} takes none"


class NoCompiler(OSError):
    """There is no compiler on this machine."""


def _compile(target: Path) -> Path:
    """Compile into a file.

    Raises:
        NoCompiler, OSError, subprocess.CalledProcessError: no compiler, no place, no success.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise NoCompiler(f"no compiler: {compiler[0]} is not there (install g++, or set CXX)")
    units = [str(SOURCES / name) for name in UNITS]
    command = [*compiler, *_flags(), *units, "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target
