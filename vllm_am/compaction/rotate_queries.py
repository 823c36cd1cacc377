"""Reference queries as they would be asked after the text: prefill queries, rotated onwards.

A query captured at position p during prefill carries the rotation of p, so it looks at its own
neighbourhood: heads with local attention see the tokens beside it, and it "sees" later keys at
negative distances, which never happens. Whoever asks about the text stands behind it. Rotary
embeddings make the move exact: rotating by the angle of (target - p) gives the query that the same
content would have had at the target. Moved behind the end of the text (``distances_behind``), its
own queries imitate those of a model that repeats it, without running one.

On the recall model it answers far more than the queries as they were captured, and about as much as
a repetition does (``benchmarks/results/quality.md``: ``context-rotated``, ``context-prefill`` and
``repeat-prefill`` with ``highest-attention`` and global budgets).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_queries(
    queries: Tensor, distances: Tensor, inverse_frequencies: Tensor, *, interleaved: bool = False
) -> Tensor:
    """Move queries by ``distances`` positions.

    Args:
        queries: [..., n, D], after rotary embedding.
        distances: [n], target position minus the position that the query was captured at.
        inverse_frequencies: [R / 2], angle per position of each pair of rotary dimensions; the
            first R of the D dimensions are rotated, the rest pass through.
        interleaved: whether pairs are neighbours (GPT-J) instead of R / 2 apart (NeoX).

    Returns:
        [..., n, D] in the dtype of ``queries``; rotated in fp32, or fp64 for fp64 queries.
    """
    rotary = 2 * len(inverse_frequencies)
    if rotary > queries.shape[-1]:
        raise ValueError(
            f"inverse_frequencies: {rotary} rotary dimensions, but queries have {queries.shape[-1]}"
        )
    if distances.shape != queries.shape[-2:-1]:
        raise ValueError(
            f"distances: expected one per query, {tuple(queries.shape[-2:-1])}, got "
            f"{tuple(distances.shape)}"
        )
    turns = turns_by(distances, inverse_frequencies, queries.dtype)
    return turn(queries, *turns, torch.empty_like(queries), interleaved=interleaved)


def turns_by(
    distances: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, R / 2] of the angles, for queries of this dtype."""
    # fp64: at a million positions the angle itself needs more than 24 bits.
    angles = torch.outer(distances.double(), inverse_frequencies.double())
    dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turn(queries: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate queries [..., n, D] by tables (see :func:`turns_by`) into ``out``, like them; ``out``.

    ``out`` may be a view of anything, but not of the queries.
    """
    rotary = 2 * cos.shape[-1]
    pairs: tuple[slice, slice] = (slice(0, rotary // 2), slice(rotary // 2, rotary))
    if interleaved:
        pairs = (slice(0, rotary, 2), slice(1, rotary, 2))
    first, second = (queries[..., pair].to(cos.dtype) for pair in pairs)
    for pair, (a, b, sign) in zip(pairs, ((first, second, -1), (second, first, 1)), strict=True):
        target = out[..., pair]
        if target.dtype == cos.dtype:  # without a temporary
            torch.mul(a, cos, out=target).addcmul_(b, sin, value=sign)
        else:
            target.copy_((a * cos).addcmul_(b, sin, value=sign))
    out[..., rotary:] = queries[..., rotary:]
    return out


def distances_behind(positions: Tensor, end: int) -> Tensor:
    """Distances [n] that carry queries at ``positions`` behind ``end``.

    The first lands on ``end`` and the others as far behind it as they were behind the first: text
    repeated from there on would stand at these positions. Queries at or behind ``end`` stay.
    """
    if positions.numel() == 0:
        return torch.zeros_like(positions)
    return torch.where(positions < end, end - positions.amin(), 0)
