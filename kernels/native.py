"""The native operators of ``csrc/``, however they come to this machine.

1. Compiled ahead of time by ``setup.py``: ``_native.so`` beside this file.
2. Compiled at first use by NVRTC, through cupy, which keeps what it compiled in its own cache.
3. Not at all, and the callers' plain-torch references do the work.

The first that works is taken, once per process, and said in the log. ``VLLM_AM_NATIVE`` set to
``aot``, ``nvrtc`` or ``off`` allows that one only. Importing this module costs nothing.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Beside this folder both in a checkout and where the package is installed.
SOURCES = Path(__file__).parents[1] / "csrc"

#: What setup.py builds.
LIBRARY = Path(__file__).with_name("_native.so")


@dataclass(frozen=True)
class BoxCall:
    """One launch of the box solver (csrc/solve_box.cuh).

    All tensors are contiguous and on the current CUDA device. gram, rhs, start and solution are all
    float32 or all float64.

    Attributes:
        gram: [B, t, t]. rhs: [B, t]. start: [B, t] or None.
        lo, hi, tolerance, max_iterations: as in ``solve_box.solve_box``.
        solution: [B, t], written. kkt_residual: float64 [B], written. iterations: int64 [B],
            written.
        counter: int32 [1], zero.
        exchange: uint8 [teams, ``solve_box.exchange_bytes``], zeros.
        workspace: uint8 [blocks of all teams, ``solve_box.workspace_bytes``].
        threads: per block.
        shared_bytes: dynamic shared memory per block.
    """

    gram: Tensor
    rhs: Tensor
    start: Tensor | None
    lo: float
    hi: float
    tolerance: float
    max_iterations: int
    solution: Tensor
    kkt_residual: Tensor
    iterations: Tensor
    counter: Tensor
    exchange: Tensor
    workspace: Tensor
    threads: int
    shared_bytes: int


class Operators(Protocol):
    """What ``csrc/`` offers, on the current stream."""

    name: str

    def solve_box(self, call: BoxCall) -> None: ...


class _AheadOfTime:
    """Operators of the library that setup.py built."""

    name = "compiled ahead of time"

    def __init__(self) -> None:
        torch.ops.load_library(str(LIBRARY))

    def solve_box(self, call: BoxCall) -> None:
        torch.ops.vllm_am.solve_box(
            call.gram,
            call.rhs,
            call.start,
            call.lo,
            call.hi,
            call.tolerance,
            call.max_iterations,
            call.solution,
            call.kkt_residual,
            call.iterations,
            call.counter,
            call.exchange,
            call.workspace,
            call.threads,
            call.shared_bytes,
            torch.cuda.current_stream().cuda_stream,
        )


class _RuntimeCompiled:
    """Kernels that NVRTC compiles for the current device when they are first used."""

    name = "compiled at run time by NVRTC"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._module = functools.cache(self._compile)
        # Here, where a failure means that the next way is tried.
        self._module(torch.cuda.current_device())

    def _compile(self, device: int) -> Any:
        module = self._cupy.RawModule(code=read_source("solve_box.cuh"), options=("-std=c++17",))
        with self._cupy.cuda.Device(device):
            module.compile()
        return module

    def solve_box(self, call: BoxCall) -> None:
        import numpy as np

        def pointer(tensor: Tensor | None) -> Any:
            return np.uint64(0 if tensor is None else tensor.data_ptr())

        batch, size = call.rhs.shape
        blocks, workspace_bytes = call.workspace.shape
        team_blocks = blocks // len(call.exchange)
        type_name = str(call.gram.dtype).removeprefix("torch.")
        device = call.gram.device.index
        kernel = self._module(device).get_function(f"solve_box_{type_name}_kernel")
        kernel.max_dynamic_shared_size_bytes = call.shared_bytes
        arguments = (
            pointer(call.gram),
            pointer(call.rhs),
            pointer(call.start),
            np.int32(batch),
            np.int32(size),
            np.float64(call.lo),
            np.float64(call.hi),
            np.float64(call.tolerance),
            np.int32(call.max_iterations),
            pointer(call.solution),
            pointer(call.kkt_residual),
            pointer(call.iterations),
            pointer(call.counter),
            pointer(call.exchange),
            pointer(call.workspace),
            np.int64(workspace_bytes),
            np.int32(call.shared_bytes),
            np.int32(team_blocks),
        )
        with self._cupy.cuda.Stream.from_external(_CurrentStream()):
            # Blocks of a team wait for each other: all have to be resident, or none. Not by way
            # of the module's own flag, which wants a library for grid groups linked in.
            kernel.kernel(
                (blocks,),
                (call.threads,),
                arguments,
                shared_mem=call.shared_bytes,
                enable_cooperative_groups=team_blocks > 1,
            )


class _CurrentStream:
    """torch's current stream, by the CUDA stream protocol (torch 2.11's own streams lack it)."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


def read_source(name: str) -> str:
    """A file of ``csrc/`` with its own includes in place, each once.

    One text and not a search path, because cupy's cache does not look into included files: after
    an update it would go on with the old kernels.
    """
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (SOURCES / name).read_text()
        text = re.sub(r"^#pragma once$", "", text, flags=re.MULTILINE)
        return re.sub(
            r'^#include "([^"]+)"$', lambda match: expand(match[1]), text, flags=re.MULTILINE
        )

    return expand(name)


#: The ways to the operators, in order of preference, by their names in VLLM_AM_NATIVE.
_WAYS: dict[str, Callable[[], Operators]] = {"aot": _AheadOfTime, "nvrtc": _RuntimeCompiled}


@functools.cache
def operators() -> Operators | None:
    """The operators, or None: there is no CUDA device, no way to them works, or they are off."""
    wanted = os.environ.get("VLLM_AM_NATIVE", "")
    if wanted not in ("", "off", *_WAYS):
        raise ValueError(f"VLLM_AM_NATIVE: expected aot, nvrtc or off, got {wanted!r}")
    if wanted == "off" or not torch.cuda.is_available():
        return None
    for name, way in _WAYS.items():
        if wanted and name != wanted:
            continue
        if name == "aot" and not LIBRARY.exists():
            logger.debug("native kernels: no %s", LIBRARY)
            continue
        try:
            found = way()
        except Exception as error:  # whatever a foreign build or compiler may raise
            logger.info("native kernels: %s does not work: %s", name, error)
            continue
        logger.info("native kernels: %s", found.name)
        return found
    logger.warning("native kernels: none, plain torch takes their place")
    return None
