"""Compile Triton kernels for a GPU that is not there.

    python -m tests.kernels.compile_only 90 tests.kernels.compile_cases_harness

A driver takes the place of Triton's own: every ``kernel[grid](...)`` in the launchers is compiled
to a cubin for the given architecture, with the ptxas of Triton's wheel, and launched nowhere.
What was compiled is written to standard output as JSON: for each case a list of ``CompiledKernel``.

The kernels of a case are those that its launchers reach with CPU tensors. Outputs are never
written, so launchers must not take decisions from them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: Bytes of shared memory that one block may have (CUDA programming guide, compute capabilities).
SHARED_MEMORY_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

#: Multiprocessors of an A100, an H200 and a B200: launchers size their grids by them.
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class CompileCase:
    """One call of a launcher, or a few.

    Attributes:
        name: unique in its module.
        run: makes small CPU tensors and calls the launcher.
        kernels: names of the kernels that must come out as cubins. All others may.
        spill_limit: most bytes that a thread may spill; None for cases whose speed does not matter.
        on_tensor_cores: whether ``kernels`` multiply matrices there.
    """

    name: str
    run: Callable[[], Any]
    kernels: tuple[str, ...]
    spill_limit: int | None = None
    on_tensor_cores: bool = False


@dataclass(frozen=True)
class CompiledKernel:
    """One cubin.

    Attributes:
        name: of the kernel.
        architecture: as written in the cubin, e.g. "sm_90a".
        cubin_bytes: its size.
        registers: per thread.
        spilled_bytes: local memory and stack per thread; not 0 if registers did not suffice.
        shared_bytes: shared memory per block, static and dynamic.
        tensor_core_instructions: matrix multiplications in its code.
    """

    name: str
    architecture: str
    cubin_bytes: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int


def inspect_cubin(name: str, cubin: bytes, shared_bytes: int) -> CompiledKernel:
    """Read a cubin's resources with the cuobjdump of Triton's wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(rf"Function {name}:\n(.*)", text)
    architecture = re.search(r"code for (\w+)", text)
    if usage is None or architecture is None:
        raise ValueError(f"cubin of {name}: no such function in it:\n{text}")
    sizes = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[1])}
    return CompiledKernel(
        name,
        architecture[1],
        len(cubin),
        sizes["REG"],
        sizes["STACK"] + sizes["LOCAL"],
        shared_bytes,
        # HMMA, HGMMA (Hopper's warp groups), UTCHMMA (Blackwell's tensor memory), DMMA
        len(re.findall(r"\b(?:UTC)?[HD]G?MMA\b", text)),
    )


class _Utilities:
    """What Triton asks of the CUDA driver when it loads a kernel."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY_LIMITS[self.architecture],
            "multiprocessor_count": _MULTIPROCESSORS[self.architecture],
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spills and threads per block; the function is the report."""
        kernel = inspect_cubin(name, cubin, shared)
        return None, kernel, kernel.registers, kernel.spilled_bytes, 1024


class CompileOnlyDriver:
    """Stands in for ``triton.backends.nvidia.driver.CudaDriver``.

    Attributes:
        launched: the kernels that would have run, in order.
    """

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)
        self.utils = _Utilities(architecture)
        self.launched: list[CompiledKernel] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: Any, *arguments: Any) -> None:
            self.launched.append(function)

        return launch

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Autotuned kernels compile all their configurations; none is faster than another."""

        def benchmark(run: Callable[[], object], quantiles: tuple[float, ...] = (0.5,)) -> Any:
            run()
            return [1.0 for _ in quantiles]

        return benchmark


def compile_cases(architecture: int, cases: list[CompileCase]) -> dict[str, list[CompiledKernel]]:
    """Run the cases under the compile-only driver; the kernels of each, by the case's name."""
    from triton.runtime import driver

    stand_in = CompileOnlyDriver(architecture)
    driver.set_active(stand_in)
    compiled = {}
    for case in cases:
        stand_in.launched.clear()
        case.run()
        compiled[case.name] = list(dict.fromkeys(stand_in.launched))
    return compiled


def main(architecture: str, module: str) -> None:
    cases: list[CompileCase] = importlib.import_module(module).CASES
    compiled = compile_cases(int(architecture), cases)
    plain = {
        name: [dataclasses.asdict(kernel) for kernel in kernels]
        for name, kernels in compiled.items()
    }
    json.dump(plain, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
