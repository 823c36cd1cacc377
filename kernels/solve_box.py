"""Bounded least squares for all heads in one launch: csrc/solve_box.cuh.

A team of thread blocks per head, from 1 to ``NATIVE_MAX_UNKNOWNS`` unknowns, and not a single
synchronisation with the host. The reference (vllm_am/compaction/fit_bias.py) factorises the free
block of every head in every iteration, asks the device a dozen questions per iteration and so
leaves it idle between launches of small matrices.

What it costs: counted on the host, on attention fits of t = 102, 205, 600, 600 and 1,200, there are
73, 141, 216, 399 and 311 products in fp32 on free blocks, as many bytes as 57, 64, 92, 198 and 78
on the full matrix, and 7 or 8 with G itself. A multiprocessor reads 95 GB/s from L2, which took
5.7 ms for t = 820 on an H200 with one block per head, whatever the number of heads up to 132: 24
heads, as a slice of layers has, left most of the device idle, and budgets that follow the attention
give single heads thousands of slots (t = 4,096: 0.85 s). So the rows of a head's matrix are divided
among as many blocks as there are for it, each of which then holds its rows in shared memory more
often than not: 0.035 s for t = 4,096 with 64 blocks, and 24 heads of t = 820 take 3.5 ms instead of
8.1 with 5 each (``benchmarks/results/gpu/solver.md``). A meeting of the blocks takes some 8 us.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_am.compaction import fit_bias
from vllm_am.compaction.fit_bias import MAX_ITERATIONS, TOLERANCE, BoxSolution
from vllm_am.kernels.native import BoxCall, Operators, operators

logger = logging.getLogger(__name__)

_reference = inspect.unwrap(fit_bias.solve_box)

#: More unknowns than this go to the reference.
NATIVE_MAX_UNKNOWNS = 4096

#: Bound of the workspace of one launch: fewer blocks run at once where they need more than this.
WORKSPACE_BYTES = 2 << 30

#: Shared memory of a block that is not dynamic: the kernel's own (1.6 KB) and CUDA's (1 KB).
_STATIC_SHARED_BYTES = 3 << 10

#: Of a thread, at most (__launch_bounds__ in csrc/solve_box.cuh).
_REGISTERS = 64

# Vectors per problem, as in csrc/box_workspace.cuh.
_BOX_VECTORS = 5
_FACE_VECTORS = 9

#: Rows that a warp multiplies at once, as in csrc/team.cuh.
_ROWS = 4

#: Rows of a matrix for which another block is worth a meeting of the team in every product.
MIN_ROWS_PER_BLOCK = 64


def solve_box(
    gram: Tensor,
    rhs: Tensor,
    lo: float,
    hi: float,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    start: Tensor | None = None,
) -> BoxSolution:
    """argmin 1/2 x'Gx - c'x over lo <= x <= hi; ``fit_bias.solve_box`` on the GPU.

    Heads are independent to the last bit. A ragged batch is padded with rows and columns of zeros
    at the end, which are not read.

    Args:
        gram: [B, t, t], symmetric positive semidefinite, float32 or float64. The optimality test
            is in fp64 on these numbers, whatever their type.
        rhs: [B, t]. start: [B, t], a first guess. The same dtype.
        lo, hi, tolerance, max_iterations: as in the reference.

    Returns:
        ``kkt_residual`` is NaN in heads with NaN or Inf in their used rows; their x is 1, clipped.
        ``iterations`` counts changes of the set of free variables (passes over G), not the
        conjugate gradients within.
    """
    native = operators() if gram.is_cuda and rhs.shape[1] <= NATIVE_MAX_UNKNOWNS else None
    if native is None or gram.dtype not in (torch.float32, torch.float64):
        return _reference(
            gram, rhs, lo, hi, tolerance=tolerance, max_iterations=max_iterations, start=start
        )
    with torch.cuda.device(gram.device):
        return _solve_native(native, gram, rhs, lo, hi, tolerance, max_iterations, start)


def _solve_native(
    native: Operators,
    gram: Tensor,
    rhs: Tensor,
    lo: float,
    hi: float,
    tolerance: float,
    max_iterations: int,
    start: Tensor | None,
    team_blocks: int | None = None,
) -> BoxSolution:
    batch, size = rhs.shape
    solution = torch.empty_like(rhs, memory_format=torch.contiguous_format)
    kkt_residual = torch.zeros(batch, dtype=torch.float64, device=rhs.device)
    iterations = torch.zeros(batch, dtype=torch.int64, device=rhs.device)
    if batch > 0 and size > 0:
        properties = torch.cuda.get_device_properties(rhs.device)
        plan = plan_launch(batch, size, properties, team_blocks)
        if plan.team_blocks > 1 and team_blocks is None and not _teams_work(rhs.device):
            plan = plan_launch(batch, size, properties, team_blocks=1)
        native.solve_box(
            BoxCall(
                gram=gram.contiguous(),
                rhs=rhs.contiguous(),
                start=None if start is None else start.contiguous(),
                lo=lo,
                hi=hi,
                tolerance=tolerance,
                max_iterations=max_iterations,
                solution=solution,
                kkt_residual=kkt_residual,
                iterations=iterations,
                counter=torch.zeros(1, dtype=torch.int32, device=rhs.device),
                exchange=torch.zeros(
                    plan.teams, exchange_bytes(size), dtype=torch.uint8, device=rhs.device
                ),
                workspace=torch.empty(
                    plan.teams * plan.team_blocks,
                    workspace_bytes(size, plan.team_blocks),
                    dtype=torch.uint8,
                    device=rhs.device,
                ),
                threads=plan.threads,
                shared_bytes=plan.shared_bytes,
            )
        )
    return BoxSolution(solution, kkt_residual.to(rhs.dtype), iterations)


@functools.cache
def _teams_work(device: torch.device) -> bool:
    """Whether a head can be given to several thread blocks here, tried once per device.

    They need a cooperative launch, which drivers and virtual machines may not offer.
    """
    native = operators()
    assert native is not None
    generator = torch.Generator().manual_seed(0)
    design = torch.rand(2 * MIN_ROWS_PER_BLOCK, 2 * MIN_ROWS_PER_BLOCK, generator=generator)
    gram = (design.mT @ design).double().unsqueeze(0).to(device)

    def solve(blocks: int) -> Tensor:
        rhs = gram.sum(dim=2) / 3
        return _solve_native(native, gram, rhs, 0.1, 10.0, 1e-7, 50, None, blocks).x

    return agree(lambda: solve(2), lambda: solve(1))


def agree(several: Callable[[], Tensor], one: Callable[[], Tensor]) -> bool:
    """Whether several blocks find what one does, to the bit; said in the log where they do not."""
    try:
        same = torch.equal(several(), one())
        why = "they do not find what one block does"
    except Exception as error:  # whatever a driver may raise
        same, why = False, str(error)
    if not same:
        logger.warning(
            "bounded least squares: one thread block per head, since several do not work here (%s)",
            why,
        )
    return same


@dataclass(frozen=True)
class Plan:
    """A launch.

    Attributes:
        teams: that take one problem after the other.
        team_blocks: thread blocks of each.
        threads: of each block.
        shared_bytes: dynamic shared memory of each block.
    """

    teams: int
    team_blocks: int
    threads: int
    shared_bytes: int


def vector_bytes(size: int) -> int:
    """Bytes of the vectors that shared memory is for, of one problem."""
    pitch = -(-size // 4) * 4
    return pitch * (4 * _FACE_VECTORS + 4 + 8 * _BOX_VECTORS)


def rows_per_block(size: int, team_blocks: int) -> int:
    """Rows of a matrix that a block multiplies, at most."""
    rows = -(-size // team_blocks)
    return min(size, -(-rows // _ROWS) * _ROWS)


def workspace_bytes(size: int, team_blocks: int = 1) -> int:
    """Bytes of global memory that a block needs if its vectors all have to lie there."""
    pitch = -(-size // 4) * 4
    matrix = 4 * rows_per_block(size, team_blocks) * pitch
    return vector_bytes(size) + 8 * _FACE_VECTORS * pitch + matrix


def exchange_bytes(size: int) -> int:
    """Bytes of global memory that the blocks of a team share (``Exchange`` in csrc/team.cuh)."""
    return 16 + 2 * 8 * size


def plan_launch(batch: int, size: int, properties: Any, team_blocks: int | None = None) -> Plan:
    """How a batch is divided among thread blocks, all of which are resident at once.

    Args:
        properties: ``torch.cuda.get_device_properties``.
        team_blocks: at most so many per team; by default as many as the device has for each.
    """
    # A warp multiplies four rows at a time.
    threads = min(max(128, 8 * (-(-size // 32) * 32)), 1024)
    limit = properties.shared_memory_per_block_optin - _STATIC_SHARED_BYTES
    pitch = -(-size // 4) * 4

    def shared_bytes(blocks: int) -> int:
        """Vectors and the largest matrix, or what there is."""
        return min(vector_bytes(size) + 4 * rows_per_block(size, blocks) * pitch, limit)

    def resident(blocks: int) -> int:
        """Blocks on the device at once; those of small problems share a multiprocessor."""
        per_processor = min(
            properties.regs_per_multiprocessor // (_REGISTERS * threads),
            properties.shared_memory_per_multiprocessor
            // (shared_bytes(blocks) + _STATIC_SHARED_BYTES),
        )
        by_memory = WORKSPACE_BYTES // workspace_bytes(size, blocks)
        return max(1, min(properties.multi_processor_count * max(1, per_processor), by_memory))

    # More than one block of a team on a multiprocessor would share what it reads by.
    most = min(properties.multi_processor_count // batch, size // MIN_ROWS_PER_BLOCK)
    blocks = max(1, most if team_blocks is None else team_blocks)
    blocks = max(1, min(blocks, resident(blocks)))
    teams = max(1, min(batch, resident(blocks) // blocks))
    return Plan(teams, blocks, threads, shared_bytes(blocks))
