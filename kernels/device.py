"""What launchers ask about the GPU that they launch on.

Through Triton's driver rather than torch's, so that kernels can be compiled for a GPU that is not
there (``tests/kernels/compile_only.py``) and run by Triton's interpreter, which has no GPU at all.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
from triton.runtime import driver


def compute_capability() -> int:
    """Of the current device, e.g. 90 for Hopper; 0 in the interpreter."""
    if triton.knobs.runtime.interpret:
        return 0
    return _limits(driver.active, driver.active.get_current_device())[0]


def multiprocessors() -> int:
    """How many blocks run at once, if one fills a multiprocessor; 4 in the interpreter."""
    if triton.knobs.runtime.interpret:
        return 4  # more than one, so that work is split as on a GPU
    return _limits(driver.active, driver.active.get_current_device())[1]


@functools.cache
def _limits(active: Any, device: int) -> tuple[int, int]:
    """Compute capability and multiprocessors. Asked once: the driver takes a millisecond to answer,
    which is longer than most kernels run."""
    count = active.utils.get_device_properties(device)["multiprocessor_count"]
    return int(active.get_current_target().arch), int(count)
