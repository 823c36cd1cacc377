"""The reference queries of some heads, out of the query pool: rotated, split, as fits read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_am.compaction.random_queries import random_queries
from vllm_am.compaction.rotate_queries import rotate_queries
from vllm_am.compaction.streaming import to_device
from vllm_am.engine.messages import FitSlice
from vllm_am.engine.worker.rotary import Rotary


def head_queries(
    pools: Sequence[torch.Tensor],
    rotations: Sequence[Rotary | None],
    heads: range,
    fit: FitSlice,
    *,
    kv_heads: int,
    heldout_share: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries to fit on and queries to measure on, disjoint, each ``[heads, N, D]``.

    The split is by token position: the queries of one position in a GQA group resemble each other
    too much to be on both sides.

    Args:
        pools: the query pool, [positions, query heads, D] by layer.
        rotations: by layer, None where queries are not rotated.
        heads: KV heads of all layers, counted layer by layer, ``kv_heads`` of each.
        fit: which of the pool's positions, and by how much they are moved.
    """
    device, group = pools[0].device, pools[0].shape[1] // kv_heads
    slots, shifts = (
        to_device(torch.as_tensor(array), device) for array in (fit.query_slots, fit.query_shifts)
    )
    layers = range(heads.start // kv_heads, -(-heads.stop // kv_heads))
    theirs = [
        range(max(0, heads.start - layer * kv_heads), min(heads.stop - layer * kv_heads, kv_heads))
        for layer in layers
    ]
    # The parts are gone once they are put together: they are as large as the whole.
    captured = torch.cat(
        [
            pools[layer][:, part.start * group : part.stop * group][slots].transpose(0, 1)
            for layer, part in zip(layers, theirs, strict=True)
        ]
    )
    rotaries = [
        (rotations[layer], len(part) * group) for layer, part in zip(layers, theirs, strict=True)
    ]
    sampled = _rotated(captured, rotaries, shifts)  # [heads * g, n, D]
    del captured
    if (drawn := fit.random_queries) is not None:
        like = to_device(torch.as_tensor(drawn.like), device)
        # Of a layer always the same, however its heads are cut.
        vectors = [
            random_queries(pools[layer][like], drawn.positions, seed=layer) for layer in layers
        ]
        first = (heads.start - layers.start * kv_heads) * group
        chosen = slice(first, first + len(heads) * group)
        sampled = torch.cat([sampled, torch.cat(vectors, dim=1).transpose(0, 1)[chosen]], dim=1)
    grouped = sampled.unflatten(0, (len(heads), group))
    positions = grouped.shape[2]
    every = max(2, round(1 / heldout_share)) if heldout_share > 0 else positions + 2
    # Every so many-th is held out. By index: nobody has to count what a mask would choose.
    fitted = torch.arange(positions - positions // every, device=device)
    fitted += fitted // (every - 1)
    held = grouped[:, :, every - 1 :: every]
    return grouped[:, :, fitted].flatten(1, 2), held.flatten(1, 2)


def _rotated(
    queries: torch.Tensor, rotaries: list[tuple[Rotary | None, int]], shifts: torch.Tensor
) -> torch.Tensor:
    """Queries [heads, n, D], each moved by its shift [n].

    Args:
        rotaries: of the heads, one behind the other: the rotation of so many of them.
    """
    first = rotaries[0][0]
    if any(rotary is not first for rotary, _ in rotaries):
        parts = queries.split([count for _, count in rotaries])
        each = zip(parts, rotaries, strict=True)
        return torch.cat([_rotated(part, [rotary], shifts) for part, rotary in each])
    if first is None or not len(shifts):
        return queries
    return rotate_queries(queries, shifts, first.inverse_frequencies, interleaved=first.interleaved)
