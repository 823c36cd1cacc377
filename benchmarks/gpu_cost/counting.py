"""Count what code would do on a GPU, by running it on tensors without contents."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

#: What only looks at a tensor in another way, or allocates without writing.
_FREE = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute",
    "scalar_tensor", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "_reshape_alias", "_unsafe_view",
}  # fmt: skip

#: Asking a tensor for its contents: the host waits for everything that is queued.
_QUESTIONS = {
    "__bool__", "__int__", "__float__", "__index__", "item", "tolist",
    "cpu", "numpy", "nonzero", "masked_select",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        name: of the operation or the kernel.
        flop: floating-point operations in matrix products; 0 for what only moves bytes.
        precision: of these: "bf16" (any 16 bits), "fp32", "fp64".
        bytes: read and written, each operand once.
        seconds: where a launch is bound by neither (see ``kernel_costs.solve_box``).
    """

    name: str
    flop: float = 0.0
    precision: str = "bf16"
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Counts:
    """Of one stage."""

    launches: list[Launch] = field(default_factory=list)
    syncs: list[str] = field(default_factory=list)
    """Where the host waits: function and line."""
    held: int = 0
    """Bytes that are allocated, of what was made since counting began."""
    peak: int = 0
    """The most of it at any time."""

    def hold(self, tensor: Tensor) -> None:
        """A tensor was made, and its storage is kept until nobody has it any more."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self.held -= size

    @property
    def bytes(self) -> float:
        return sum(launch.bytes for launch in self.launches)

    @property
    def flop(self) -> dict[str, float]:
        """By precision."""
        total = {"bf16": 0.0, "fp32": 0.0, "fp64": 0.0}
        for launch in self.launches:
            total[launch.precision] += launch.flop
        return total


#: What a kernel costs, from the keyword arguments of its launch and the grid.
KernelCost = Callable[[dict[str, Any], tuple[int, ...]], Launch]


class _Operations(TorchDispatchMode):
    """torch's own operations."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        out = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        for x in out:
            if x.is_meta and x.untyped_storage()._cdata not in known:
                self.counts.hold(x)
        if name in _FREE or not any(x.is_meta for x in out):
            return result
        flop = 0.0
        if func.overloadpacket in flop_registry:
            flop = float(
                flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            )
        if name in ("linalg_cholesky_ex", "linalg_solve_triangular"):
            *batch, rows, columns = out[0].shape
            flop = torch.Size(batch).numel() * rows**2 * columns / (3 if "chol" in name else 1)
        self.counts.launches.append(
            Launch(name, flop, _precision(given or out), sum(map(_bytes, [*given, *out])))
        )
        return result


class _Questions(TorchFunctionMode):
    """Questions to the device, and products that ``meta`` has no version of."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name in ("bmm", "baddbmm") and "out_dtype" in kwargs:
            a, b = args[-2:]
            total = kwargs.get("out")
            moved = _bytes(a) + _bytes(b) + (0 if total is None else _bytes(total))
            if total is None:
                total = a.new_empty(*a.shape[:2], b.shape[2], dtype=kwargs["out_dtype"])
            flop = 2.0 * a.numel() * b.shape[2]
            moved += _bytes(total)
            self.counts.launches.append(Launch("product", flop, _precision([a]), moved))
            return total
        if name in _QUESTIONS and isinstance(first, Tensor) and first.is_meta:
            self.counts.syncs.append(f"{name}: {_caller()}")
            # All is well: no head has failed.
            if name == "__bool__":
                return True
            if name == "tolist":
                return torch.zeros(first.shape, dtype=first.dtype).tolist()
            if name == "cpu":
                return torch.zeros(first.shape, dtype=first.dtype)
            raise NotImplementedError(f"{name} of what is not there: {_caller()}")
        return func(*args, **kwargs)


def _caller() -> str:
    """The innermost line of the package that is being executed."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        file = frame.f_code.co_filename
        if "/vllm_am/" in file or "/kernels/" in file:
            return f"{file.rsplit('/', 1)[1]}, {frame.f_code.co_name}"
    return "?"


def _bytes(tensor: Tensor) -> int:
    """That are stored: an expanded dimension is one entry."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    entries = 1
    for size, stride in sizes:
        entries *= size if stride else min(size, 1)
    return entries * tensor.itemsize


def _precision(tensors: list[Tensor]) -> str:
    size = max((x.itemsize for x in tensors if x.is_floating_point()), default=2)
    return {2: "bf16", 4: "fp32", 8: "fp64"}[size]


@contextmanager
def counting(kernels: dict[str, KernelCost]) -> Iterator[Counts]:
    """Count what is done with tensors on ``meta`` as if they were on a GPU.

    Args:
        kernels: what Triton kernels cost, by name; one that is launched and not here is an error.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from benchmarks.gpu_cost import kernel_costs
    from vllm_am.compaction.accelerate import use_kernels

    counts = Counts()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in self.params]
        bound = dict(zip(names, args, strict=False)) | kwargs
        counts.launches.append(kernels[self.fn.__name__](bound, grid))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(driver, "_active", kernel_costs.PaperDriver()))
        stack.enter_context(kernel_costs.box_solver(counts.launches.append))
        stack.enter_context(use_kernels(True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Questions(counts))
        stack.enter_context(_Operations(counts))
        yield counts
