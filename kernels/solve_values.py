"""Batched least squares by Cholesky, without a question to the device.

The same problem as its reference, ``vllm_am/compaction/fit_values.py`` (solve_values), arranged for
a GPU: hundreds of fp64 matrices of tens to thousands of rows.

torch's batched Cholesky is made for small matrices (one thread block or a few launches per matrix),
and its batched solve with many right-hand sides takes the heads one by one. So the factorisation
is blocked by hand: cuSOLVER for the diagonal blocks of ``PANEL`` rows, cuBLAS's batched fp64
matrix products, on tensor cores, for everything else. It looks left, so that every panel is
written once and a solve takes no more than its t^3 / 3 + 2 t^2 Dv operations. On an H200 24 heads
of t = 820 and Dv = 128 take 5.3, 3.7 and 2.7 ms with panels of 64, 128 and 256 rows, and 4.2 ms in
one panel, which is plain cuSOLVER; 32 heads of t = 600 and Dv = 256 take 5.3, 3.6, 2.7 and 3.2 ms.
With narrow panels the host, which launches some thirty kernels for each, is what takes the time.

Heads are grouped by size, because a head of 40 slots in a batch of 1,000 would cost 1,000^3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Rows of a diagonal block.
PANEL = 256

#: Sizes of the groups, in panels: no head is padded by more than half of its size.
_GROUP_PANELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def solve_values(
    gram: Tensor,
    rhs: Tensor,
    prior: Tensor,
    ridge: Tensor | float,
    *,
    lengths: Sequence[int] | None = None,
    panel: int = PANEL,
) -> tuple[Tensor, Tensor]:
    """(G + r I)^-1 (rhs + r prior) with r = ridge * mean of the used diagonal of G.

    Args:
        gram: [H, t, t]; rows and columns of padding are zero.
        rhs, prior: [H, t, Dv]. The dtype of gram, float64 for the accuracy of the reference.
        ridge: relative ridge, [H] or one number.
        lengths: slots of each head, known on the host; what lies beyond is padding. By default
            all t of every head.
        panel: rows of a diagonal block.

    Returns:
        solution [H, t, Dv] and singular [H] bool. A singular head, or one with numbers that are not
        finite, has the solution 0 and does not touch the other heads. A slot with a zero diagonal,
        padding too, keeps its prior value.
    """
    heads, size, _ = rhs.shape
    lengths = [size] * heads if lengths is None else lengths
    if len(lengths) != heads or any(not 0 <= length <= size for length in lengths):
        raise ValueError(f"lengths: expected {heads} numbers of slots from 0 to {size}")
    solution = prior.clone()
    singular = torch.zeros(heads, dtype=torch.bool, device=gram.device)
    ridge = torch.as_tensor(ridge, dtype=gram.dtype, device=gram.device).expand(heads)
    for group, width in _groups(lengths, size, panel):
        # All heads, as they are, need no index that has to be sent to the device.
        chosen: Tensor | slice = slice(None)
        if len(group) < heads:
            chosen = torch.tensor(group).to(gram.device, non_blocking=True)
        matrix = gram[chosen, :width, :width]  # a copy, unless all heads are chosen
        part, failed = _solve_group(
            matrix if len(group) < heads else matrix.clone(),
            rhs[chosen, :width],
            prior[chosen, :width],
            ridge[chosen],
            panel,
        )
        solution[chosen, :width] = part
        # A failed head is 0 in its padding too, like the reference's.
        solution[chosen, width:] = solution[chosen, width:].masked_fill(failed.view(-1, 1, 1), 0.0)
        singular[chosen] = failed
    return solution, singular


def _groups(lengths: Sequence[int], size: int, panel: int) -> list[tuple[list[int], int]]:
    """Heads and the rows that are worked on, for each size that occurs."""
    groups: dict[int, list[int]] = {}
    for head, length in enumerate(lengths):
        panels = -(-length // panel)
        width = next((n for n in _GROUP_PANELS if n >= panels), panels) * panel
        groups.setdefault(min(width, size), []).append(head)
    return [(heads, width) for width, heads in groups.items() if width > 0]


def _solve_group(
    gram: Tensor, rhs: Tensor, prior: Tensor, ridge: Tensor, panel: int
) -> tuple[Tensor, Tensor]:
    """As ``solve_values``, for heads that are all worked on in full. Overwrites ``gram``."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    used = diagonal > 0
    mean = diagonal.sum(dim=1) / used.sum(dim=1).clamp(min=1)
    shift = torch.where(used, (ridge * mean).unsqueeze(1), 1.0)  # [H, t]
    diagonal.add_(shift)
    inverses, failed = _factorise(gram, panel)
    solution = _substitute(gram, inverses, rhs + shift.unsqueeze(2) * prior, panel)
    # A comparison with NaN is false where cuSOLVER and LAPACK disagree about NaN in the input.
    failed = failed | ~solution.isfinite().all(dim=2).all(dim=1)
    return solution.masked_fill(failed.view(-1, 1, 1), 0.0), failed


def _factorise(matrix: Tensor, panel: int) -> tuple[list[Tensor], Tensor]:
    """Overwrite the part below the diagonal blocks with that of the Cholesky factor L.

    Returns the inverses of the diagonal blocks of L, and the heads [H] whose matrix is not
    positive definite; what the others come to does not depend on theirs.
    """
    size = matrix.shape[1]
    identity = torch.eye(min(panel, size), dtype=matrix.dtype, device=matrix.device)
    inverses: list[Tensor] = []
    infos: list[Tensor] = []
    for start in range(0, size, panel):
        end = min(start + panel, size)
        if start > 0:
            left = matrix[:, start:, :start]
            matrix[:, start:, start:end].baddbmm_(left, left[:, : end - start].mT, alpha=-1.0)
        block, info = torch.linalg.cholesky_ex(matrix[:, start:end, start:end])
        infos.append(info)
        unit = identity[: end - start, : end - start].expand_as(block)
        inverses.append(torch.linalg.solve_triangular(block, unit, upper=False))
        if end < size:
            matrix[:, end:, start:end] = matrix[:, end:, start:end] @ inverses[-1].mT
    return inverses, torch.stack(infos).any(dim=0)


def _substitute(factor: Tensor, inverses: list[Tensor], rhs: Tensor, panel: int) -> Tensor:
    """(L L')^-1 rhs, from what ``_factorise`` leaves behind."""
    size = factor.shape[1]
    x = rhs.clone()
    panels = [(start, min(start + panel, size)) for start in range(0, size, panel)]
    for (start, end), inverse in zip(panels, inverses, strict=True):
        x[:, start:end].baddbmm_(factor[:, start:end, :start], x[:, :start], alpha=-1.0)
        x[:, start:end] = inverse @ x[:, start:end]
    for (start, end), inverse in zip(reversed(panels), reversed(inverses), strict=True):
        x[:, start:end].baddbmm_(factor[:, end:, start:end].mT, x[:, end:], alpha=-1.0)
        x[:, start:end] = inverse.mT @ x[:, start:end]
    return x
