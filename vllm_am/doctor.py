"""``vllm-am doctor``: whether compaction would run here, and by which ways.

Every check looks at what a server would use, and says what to do where something is missing. What a
server can do without is a warning; what stops it from compacting is a failure.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch


class Verdict(Enum):
    """Of one check."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        what: was looked at.
        says: what is there, and the fix where it is not what it should be.
    """

    what: str
    verdict: Verdict
    says: str


#: What a fresh process of vLLM is asked: whether it loads the plugin, and then knows the flag.
_PLUGIN_PROBE = """
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
load_general_plugins()
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
parser.parse_args(["--kv-compaction", "attention-matching"])
print("knows --kv-compaction")
"""

#: Of the self-test: heads, tokens, queries, size.
_SELF_TEST = (4, 1024, 512, 64)


def findings() -> Iterator[Finding]:
    """All checks, one after the other."""
    for what, check in CHECKS.items():
        try:
            verdict, says = check()
        except Exception as error:  # whatever is broken: the other checks still tell something
            verdict, says = Verdict.FAILURE, f"{type(error).__name__}: {error}"
        yield Finding(what, verdict, says)


def _versions() -> tuple[Verdict, str]:
    names = ("vllm-am", "torch", "triton")
    found = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in names)]
    return Verdict.OK, ", ".join(found)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _vllm() -> tuple[Verdict, str]:
    # Here: the other checks go on without vLLM.
    from vllm import __version__

    from vllm_am.engine import versions

    try:
        versions.check()
    except ValueError as error:
        return Verdict.FAILURE, str(error)
    return Verdict.OK, f"vLLM {__version__}"


def _plugin() -> tuple[Verdict, str]:
    ours = [e for e in entry_points(group="vllm.general_plugins") if e.name == "vllm_am"]
    if not ours:
        return Verdict.FAILURE, "vLLM finds no plugin vllm_am: install the package (pip install .)"
    run = subprocess.run(
        [sys.executable, "-c", _PLUGIN_PROBE], capture_output=True, text=True, timeout=300
    )
    if run.returncode == 0:
        return Verdict.OK, f"{ours[0].value}; a fresh process {run.stdout.splitlines()[-1]}"
    reason = (run.stderr.strip().splitlines() or ["no reason"])[-1]
    return Verdict.FAILURE, f"a fresh process does not know --kv-compaction: {reason}"


def _cpu_kernel() -> tuple[Verdict, str]:
    from vllm_am.kernels.cpu_library import load

    found = load()
    if found.code is not None:
        return Verdict.OK, found.says
    return Verdict.WARNING, f"plain torch takes its place, several times slower ({found.says})"


def _gpu() -> tuple[Verdict, str]:
    if not torch.cuda.is_available():
        return Verdict.OK, "none: vLLM's CPU build serves"
    properties = torch.cuda.get_device_properties(0)
    name = f"{torch.cuda.device_count()} x {properties.name}"
    if (properties.major, properties.minor) < (8, 0):
        return Verdict.FAILURE, f"{name}: compute capability 8.0 or more is needed"
    from vllm_am.kernels.native import operators

    native = operators()
    if native is None:
        return Verdict.WARNING, f"{name}; no native solver: plain torch takes its place, slower"
    return Verdict.OK, f"{name}; box solver {native.name}"


def _self_test() -> tuple[Verdict, str]:
    """A compaction against what a head without any fit would lose."""
    from vllm_am.compaction import compact

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, tokens, queries, size = _SELF_TEST
    generator = torch.Generator().manual_seed(0)
    keys, values, asked = (
        torch.randn(heads, n, size, generator=generator).to(device, dtype)
        for n in (tokens, tokens, queries)
    )
    started = time.perf_counter()
    fitted, evicted = (
        compact(keys, values, asked, ratio="10x", method=method)
        for method in ("highest-attention", "evict-mean")
    )
    errors = [float(each.output_error.mean()) for each in (fitted, evicted)]
    seconds = time.perf_counter() - started
    says = (
        f"10x on {device.type}: error {errors[0]:.2f}, of eviction {errors[1]:.2f}; {seconds:.1f} s"
    )
    return (Verdict.OK if errors[0] < errors[1] else Verdict.FAILURE), says


#: By what they look at.
CHECKS: dict[str, Callable[[], tuple[Verdict, str]]] = {
    "versions": _versions,
    "vLLM": _vllm,
    "plugin": _plugin,
    "attention kernel of CPUs": _cpu_kernel,
    "GPU": _gpu,
    "self-test": _self_test,
}
