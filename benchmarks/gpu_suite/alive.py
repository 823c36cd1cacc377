"""The first minute on a device: versions, libraries, and the whole method once on kernels.

    python -m benchmarks.gpu_suite.alive [--smoke]

A line per check, ``ok`` or ``FAIL``, whatever became of those before it.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points, version

import torch

from benchmarks.gpu_suite.fit_speed import make_heads
from benchmarks.gpu_suite.timing import device
from vllm_am.compaction import CompactedKV, compact, evaluate_fit
from vllm_am.compaction.accelerate import use_kernels
from vllm_am.compaction.pages import PagedKV, page_table, read_pages, write_pages


def versions() -> str:
    """Of what runs, and of the device."""
    packages = [f"{name} {version(name)}" for name in ("vllm", "torch", "triton", "vllm-am")]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        packages.append(
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors"
        )
    return ", ".join(packages)


def plugin() -> str:
    """vLLM loads us through our entry point."""
    from vllm.plugins import load_general_plugins

    found = [point.value for point in entry_points(group="vllm.general_plugins")]
    load_general_plugins()
    if not any("vllm_am" in value for value in found):
        raise RuntimeError(f"entry points: {found}")
    return ", ".join(found)


def flash_attention() -> str:
    """The version that vLLM takes here."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return f"version {get_flash_attn_version()}"


def native() -> str:
    """The operators of ``csrc/``, compiled when they are first used."""
    from vllm_am.kernels.native import operators

    found = operators()
    if found is None and torch.cuda.is_available():
        raise RuntimeError("none: the solver runs in plain torch")
    return "none" if found is None else found.name


class Fits:
    """The same heads fitted by the kernels and in plain torch."""

    def __init__(self, smoke: bool) -> None:
        sizes = (2, 90, 80, 32) if smoke else (8, 2048, 2048, 128)
        self.heads = make_heads(*sizes)
        if not torch.cuda.is_available():  # the interpreter is wrong in bfloat16
            vectors = {name: tensor.float() for name, tensor in vars(self.heads).items()}
            self.heads = replace(self.heads, **vectors)
        self.slots = 12 if smoke else 100

    def fit(self, kernels: bool) -> CompactedKV:
        heads = self.heads
        with use_kernels(kernels):
            return compact(heads.keys, heads.values, heads.queries, budget=self.slots)

    def compare(self) -> str:
        """Errors of both fits on the queries; the kernels' may not be larger."""
        begin = time.perf_counter()
        ours = self.fit(True)
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        self.fit(True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        second = time.perf_counter() - begin
        theirs = self.fit(False)
        heads = self.heads
        with use_kernels(False):
            errors = [
                float(evaluate_fit(f, heads.keys, heads.values, heads.queries).output_error.mean())
                for f in (ours, theirs)
            ]
        same = (ours.indices == theirs.indices).float().mean()
        said = (
            f"output error {errors[0]:.5f}, in torch {errors[1]:.5f}; {float(same):.1%} of the "
            f"keys the same; first call {first:.1f} s, second {1e3 * second:.1f} ms"
        )
        if not errors[0] <= 1.02 * errors[1] + 1e-4:
            raise RuntimeError(said)
        return said

    def attend(self) -> str:
        """Written to pages, and attended to from a graph."""
        from vllm_am.kernels.attention import (
            CompactedAttentionWorkspace,
            RowTables,
            attend_compacted,
            attend_compacted_reference,
        )

        fit = self.fit(True)
        heads, slots, dim = fit.keys.shape
        dtype = self.heads.keys.dtype
        count = -(-slots // 16)
        storage = torch.zeros(count + 1, heads, 16, 2 * dim, device=device(), dtype=dtype)
        kv = PagedKV.from_layers([storage])
        lists = torch.randperm(heads * count).view(heads, count)
        write_pages(kv, list(lists), fit)
        keys, _ = read_pages(kv, lists.to(device()))
        if not torch.equal(keys[:, :slots][fit.indices >= 0], fit.keys[fit.indices >= 0].to(dtype)):
            raise RuntimeError("the pages do not hold the keys")
        query = torch.randn(4, 2 * heads, dim, device=device(), dtype=dtype)
        live = torch.randn_like(query)
        lse = torch.randn(2 * heads, 4, device=device())
        table = page_table(list(lists)).to(device())
        loc = torch.arange(5, dtype=torch.int32, device=device())
        rows = RowTables(loc, torch.tensor([table.data_ptr(), 0] * 2, device=device()))
        workspace = CompactedAttentionWorkspace(4, heads, 2, dim, device())
        output = live.clone()
        arguments = {"scale": dim**-0.5}

        def step() -> None:
            output.copy_(live)
            attend_compacted(
                query, output, lse, kv, 0, rows, workspace, max_query_len=1, **arguments
            )

        step()
        if torch.cuda.is_available():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            output.zero_()
            graph.replay()
            torch.cuda.synchronize()
        expected = attend_compacted_reference(
            query, live, lse, kv, 0, loc.tolist(), [table, None] * 2, **arguments
        )
        error = float((output.double() - expected).norm() / expected.norm())
        if not error < 5e-3:
            raise RuntimeError(f"relative error {error}")
        return f"relative error {error:.1e}"


def main(arguments: list[str]) -> int:
    """Run the checks; how many failed."""
    fits = Fits("--smoke" in arguments)
    checks: dict[str, Callable[[], str]] = {
        "versions": versions,
        "plugin": plugin,
        "FlashAttention": flash_attention,
        "operators of csrc": native,
        "compact on kernels": fits.compare,
        "pages, attention in a graph": fits.attend,
    }
    if not torch.cuda.is_available():
        del checks["FlashAttention"], checks["operators of csrc"]
    failed = 0
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            verdict, said = "ok  ", check()
        except Exception as error:
            traceback.print_exc()
            verdict, said = "FAIL", f"{type(error).__name__}: {error}"
            failed += 1
        print(f"{verdict}  {name:28} {time.perf_counter() - start:6.1f} s  {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
