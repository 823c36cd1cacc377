"""Where a stage runs: in plain torch, or in the kernel that it is the reference of.

A stage is decorated with the module of its kernel, whose launcher has the same name and the same
arguments (but for ``chunk_bytes``, the bound of temporaries that a GPU kernel does not have). What
is on a GPU goes to a GPU kernel; what is on a CPU to a compiled one, where there is a compiler.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_forced: ContextVar[bool | None] = ContextVar("use_kernels", default=None)


@contextmanager
def use_kernels(on: bool) -> Iterator[None]:
    """Kernels whatever the device (the CPU's interpreter, in tests), or torch even on a GPU."""
    token = _forced.set(on)
    try:
        yield
    finally:
        _forced.reset(token)


def accelerated_by(
    module: str, *, double: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a stage with the module that holds its kernel, imported when first needed.

    Args:
        double: whether the kernel takes fp64; if not, that stays in torch.
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(reference)
        def stage(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0]
            assert isinstance(first, torch.Tensor)
            if not goes_to_kernel(first) or (first.dtype == torch.float64 and not double):
                return reference(*args, **kwargs)
            launcher = getattr(importlib.import_module(module), reference.__name__)
            result: R = launcher(*args, **{k: v for k, v in kwargs.items() if k != "chunk_bytes"})
            return result

        return stage

    return decorate


def compiled_by(module: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a stage with the module that holds its CPU kernel, which takes contiguous fp32."""

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(reference)
        def stage(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0]
            assert isinstance(first, torch.Tensor)
            if (
                first.device.type == "cpu"
                and first.dtype == torch.float32
                and first.is_contiguous()
                and _forced.get() is not False
                and importlib.import_module("vllm_am.kernels.cpu_library").library() is not None
            ):
                launcher = getattr(importlib.import_module(module), reference.__name__)
                result: R = launcher(*args, **kwargs)
                return result
            return reference(*args, **kwargs)

        return stage

    return decorate


def goes_to_kernel(tensor: torch.Tensor) -> bool:
    """Whether work on this tensor is done by kernels."""
    forced = _forced.get()
    return tensor.is_cuda if forced is None else forced
