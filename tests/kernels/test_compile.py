"""Every Triton kernel becomes a cubin for sm_80, sm_90 and sm_100, without a GPU.

The call sites are the ``CASES`` of the modules ``compile_cases_*.py`` beside this file. Compiling
and interpreting exclude each other within a process, so the cases run in another one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

from tests.kernels.compile_only import SHARED_MEMORY_LIMITS, CompiledKernel

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    f"tests.kernels.{path.stem}" for path in Path(__file__).parent.glob("compile_cases_*.py")
)
CASES = [
    pytest.param(
        module, case, id=f"{module.removeprefix('tests.kernels.compile_cases_')}-{case.name}"
    )
    for module in MODULES
    for case in importlib.import_module(module).CASES
]


@lru_cache
def compiled_cases(architecture: int, module: str) -> dict[str, list[CompiledKernel]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_only", str(architecture), module],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    plain = json.loads(run.stdout)
    return {
        name: [CompiledKernel(**kernel) for kernel in kernels] for name, kernels in plain.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_MEMORY_LIMITS)
@pytest.mark.parametrize(("module", "case"), CASES)
def test_compiles_ahead_of_time(architecture, module, case):
    compiled = compiled_cases(architecture, module)[case.name]
    counts = Counter(kernel.name for kernel in compiled)
    missing = [name for name in case.kernels if counts[name] == 0]
    assert not missing, f"not compiled: {missing}; compiled: {dict(counts)}"
    for kernel in compiled:
        print(kernel)
        assert kernel.architecture.startswith(f"sm_{architecture}")
        assert kernel.cubin_bytes > 0
        assert kernel.shared_bytes <= SHARED_MEMORY_LIMITS[architecture]
        if case.spill_limit is not None:
            assert kernel.spilled_bytes <= case.spill_limit
        if case.on_tensor_cores and kernel.name in case.kernels:
            assert kernel.tensor_core_instructions > 0
