"""What our own kernels cost, from the arguments that they are launched with.

Bytes are what has to come from and go to the device's memory at least: each operand once. Tiles
that are read again come from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_cost.counting import KernelCost, Launch
from vllm_am.compaction.fit_bias import BoxSolution
from vllm_am.kernels.solve_box import plan_launch, rows_per_block, workspace_bytes

#: Multiprocessors of an H100 and an H200.
MULTIPROCESSORS = 132

#: What the box solver's launcher asks of a Hopper GPU.
_PROPERTIES = SimpleNamespace(
    multi_processor_count=MULTIPROCESSORS,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)

#: Of the box solver: products with the matrix (or what is free of it) that a head takes, and bytes
#: per second that one multiprocessor reads. With 200 products and one block per head this is what
#: an H200 was measured at: 5.7 ms for t = 820 and 3.05 ms for t = 600, up to 132 heads at once
#: (benchmarks/results/gpu). More slots can take more products: 250 for t = 1,640 and 500 for 3,276.
_PRODUCTS, _MULTIPROCESSOR_RATE = 200, 95e9
#: Seconds that a product takes where nothing is to be read: barriers and reductions of a block, and
#: the meeting of several (by ``solver.md`` there: 0.91 ms for t = 205, 3.5 ms for 24 heads of 820).
_PRODUCT_SECONDS, _MEETING_SECONDS = 4e-6, 8e-6


class PaperDriver:
    """What launchers ask of Triton's driver: a Hopper GPU."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "multiprocessor_count": MULTIPROCESSORS,
            "max_shared_mem": 227 << 10,
        }
    )

    def get_current_target(self) -> Any:
        return SimpleNamespace(arch=90)

    def get_current_device(self) -> int:
        return 0


@contextmanager
def box_solver(launched: Callable[[Launch], None]) -> Iterator[None]:
    """Stand in for the solver, which no Triton kernel is."""

    def solve_box(gram: Tensor, rhs: Tensor, lo: float, hi: float, **_: Any) -> BoxSolution:
        heads, size = rhs.shape
        plan = plan_launch(heads, size, _PROPERTIES)
        read = 4 * rows_per_block(size, plan.team_blocks) * size / _MULTIPROCESSOR_RATE
        beside = _PRODUCT_SECONDS + (_MEETING_SECONDS if plan.team_blocks > 1 else 0.0)
        product = max(read, beside) if plan.team_blocks == 1 else read + beside
        seconds = -(-heads // plan.teams) * _PRODUCTS * product
        launched(Launch("solve_box", 0.0, "fp32", gram.nbytes, seconds))
        torch.empty(
            plan.teams * plan.team_blocks,
            workspace_bytes(size, plan.team_blocks),
            dtype=torch.uint8,
            device=rhs.device,
        )
        return BoxSolution(
            torch.empty_like(rhs),
            rhs.new_empty(heads),
            torch.empty(heads, dtype=torch.int64, device=rhs.device),
        )

    with mock.patch("vllm_am.kernels.solve_box.solve_box", solve_box):
        yield


def _stored(*tensors: Tensor | None) -> float:
    return float(sum(x.nbytes for x in tensors if x is not None))


def _forward(a: dict[str, Any], grid: tuple[int, ...]) -> Launch:
    heads = grid[0] // a["query_blocks"]
    width = a["D"] + a["DV"]
    moved = _stored(a["queries"], a["keys"], a["values"], a["bias"], a["output"], a["lse"])
    return Launch("attention_forward", 2.0 * heads * a["N"] * a["T"] * width, "bf16", moved)


def _scores(a: dict[str, Any], grid: tuple[int, ...]) -> Launch:
    flop = 2.0 * a["H"] * a["N"] * a["T"] * a["D"]
    outputs = (a["square_sums"], a["maxima"], a["sums"])
    return Launch("key_scores", flop, "bf16", _stored(a["queries"], a["keys"], a["lse"], *outputs))


def _design(a: dict[str, Any], grid: tuple[int, ...]) -> Launch:
    heads = grid[0] // (a["row_blocks"] * a["key_blocks"])
    flop = 2.0 * heads * a["height"] * a["columns"] * a["D"]
    read = heads * (a["rows"] + a["t"]) * a["D"] * a["queries"].itemsize
    return Launch("design_matrix", flop, "bf16", read + _stored(a["high"], a["low"]))


def _write_pages(a: dict[str, Any], grid: tuple[int, ...]) -> Launch:
    page = a["SIZE"] * (2 * a["D"] * a["pages"].itemsize + 4)
    return Launch("write_pages", 0.0, "bf16", grid[0] * page + _stored(a["keys"], a["values"]))


#: By name. The decode kernel reads what its page tables say, which has no contents here: see
#: ``stages.decode``.
KERNEL_COSTS: dict[str, KernelCost] = {
    "attention_forward_kernel": _forward,
    "key_scores_kernel": _scores,
    "design_matrix_kernel": _design,
    "write_pages_kernel": _write_pages,
    "attend_compacted_kernel": lambda a, grid: Launch("attend_compacted"),
}
