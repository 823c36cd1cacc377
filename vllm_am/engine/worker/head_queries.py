"""The reference queries of some heads, out of the query pool: rotated, split, as fits read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_am.compaction.random_queries import random_queries
from vllm_am.compaction.rotate_queries import turn, turns_by
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
    positions = len(fit.query_slots)
    if fit.random_queries is not None and len(fit.random_queries.like):
        positions += fit.random_queries.positions
    every = max(2, round(1 / heldout_share)) if heldout_share > 0 else positions + 2
    # Every so many-th is held out.
    held = np.arange(every - 1, positions, every)
    fitted = np.delete(np.arange(positions), held)
    return (
        _gather(pools, rotations, heads, fit, fitted, kv_heads),
        _gather(pools, rotations, heads, fit, held, kv_heads),
    )


def _gather(
    pools: Sequence[torch.Tensor],
    rotations: Sequence[Rotary | None],
    heads: range,
    fit: FitSlice,
    which: np.ndarray,
    kv_heads: int,
) -> torch.Tensor:
    """Some of the fit's positions, ``[heads, group * len(which), D]``.

    Args:
        which: ascending; random vectors come behind the positions of the pool.
    """
    device, (_, query_heads, dim) = pools[0].device, pools[0].shape
    group = query_heads // kv_heads
    sampled = len(fit.query_slots)
    mine, others = which[which < sampled], which[which >= sampled] - sampled
    slots, shifts = (
        to_device(torch.as_tensor(array[mine]), device)
        for array in (fit.query_slots, fit.query_shifts)
    )
    queries = pools[0].new_empty(len(heads), group, len(which), dim)
    rows = queries.flatten(0, 1)
    turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    begin = 0
    for layers in _runs(heads, kv_heads, rotations, alone=device.type == "cpu"):
        parts = []
        for layer, chosen in layers:
            theirs = slice(chosen.start * group, chosen.stop * group)
            parts.append(pools[layer][:, theirs].index_select(0, slots))
        captured = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).transpose(0, 1)
        target = rows[begin : begin + len(captured), : len(mine)]
        begin += len(captured)
        if (rotary := rotations[layers[0][0]]) is None:
            target.copy_(captured)
            continue
        if id(rotary) not in turns:
            turns[id(rotary)] = turns_by(shifts, rotary.inverse_frequencies, captured.dtype)
        turn(captured, *turns[id(rotary)], target, interleaved=rotary.interleaved)
    if (drawn := fit.random_queries) is not None and len(others):
        like, places = (to_device(torch.as_tensor(x), device) for x in (drawn.like, others))
        read = range(heads.start // kv_heads, -(-heads.stop // kv_heads))
        # Of a layer always the same, however its heads are cut.
        vectors = torch.cat(
            [random_queries(pools[each][like], drawn.positions, seed=each) for each in read], dim=1
        )
        first = (heads.start - read.start * kv_heads) * group
        vectors = vectors[:, first : first + len(rows)].index_select(0, places)
        rows[:, len(mine) :] = vectors.transpose(0, 1)
    return queries.flatten(1, 2)


def _runs(
    heads: range, kv_heads: int, rotations: Sequence[Rotary | None], *, alone: bool
) -> list[list[tuple[int, range]]]:
    """Layers and their heads among these, in runs that are rotated alike, or each alone.

    On a CPU one layer's queries stay in its caches until they are rotated; on a GPU fewer launches
    are worth more.
    """
    runs: list[list[tuple[int, range]]] = []
    for layer in range(heads.start // kv_heads, -(-heads.stop // kv_heads)):
        first = layer * kv_heads
        own = range(max(heads.start - first, 0), min(heads.stop - first, kv_heads))
        if not runs or alone or rotations[layer] is not rotations[runs[-1][0][0]]:
            runs.append([])
        runs[-1].append((layer, own))
    return runs
