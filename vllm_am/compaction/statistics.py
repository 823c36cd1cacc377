"""What the original cache does to the reference queries: log mass, output, and a score per key.

One pass over blocks of queries; a block sees all T keys at once, so each row is finished (shifted,
normalised, multiplied with the values) while its scores are in cache, and then forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_am.compaction.accelerate import accelerated_by
from vllm_am.compaction.attend import attention_weights
from vllm_am.compaction.streaming import (
    DEFAULT_CHUNK_BYTES,
    accumulation_dtype,
    head_blocks,
    row_blocks,
)

#: Norms over the queries of a key's attention weight A_ij that a score can be.
SCORE_NORMS = ("rms", "max", "mean")


@dataclass(frozen=True)
class AttentionStatistics:
    """fp32, or fp64 for fp64 inputs.

    Attributes:
        lse: [H, N], log sum_j exp(scale q_i.k_j + b_j).
        output: [H, N, Dv], the softmax-weighted mean of the values.
        scores: norm name -> [H, T], the norm over the N queries of the weights A_ij.
    """

    lse: Tensor
    output: Tensor
    scores: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.lse, self.output, *self.scores.values()))

    @classmethod
    def joined(cls, parts: Sequence[AttentionStatistics]) -> AttentionStatistics:
        """Those of all the heads of some, of the same queries and tokens; at least one."""
        if len(parts) == 1:
            return parts[0]
        norms = parts[0].scores
        scores = {norm: torch.cat([part.scores[norm] for part in parts]) for norm in norms}
        lse, output = ([getattr(p, name) for p in parts] for name in ("lse", "output"))
        return cls(torch.cat(lse), torch.cat(output), scores)

    def heads(self, index: Tensor | slice) -> AttentionStatistics:
        """Those of some of the heads."""
        scores = {norm: score[index] for norm, score in self.scores.items()}
        return AttentionStatistics(self.lse[index], self.output[index], scores)


def unweighted(scores: Tensor, key_bias: Tensor) -> Tensor:
    """Scores as if each key stood for itself alone: without the weight that its bias gives it.

    A slot of an earlier compaction has the mass of many keys. Compared by that, slots of heads
    whose attention is spread out would in every merge displace single keys that are looked for,
    while their mass can be carried by fewer slots. Nobody's weight is made larger.

    Args:
        scores: [H, T], see :class:`AttentionStatistics`.
        key_bias: float32 [H, T].
    """
    return scores * key_bias.clamp(min=0).neg().exp()


@accelerated_by("vllm_am.kernels.statistics")
def attention_lse(
    keys: Tensor,
    queries: Tensor,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """The log-sum-exp of :func:`attention_statistics` alone, [H, N]."""
    heads, columns, _ = keys.shape
    rows = queries.shape[1]
    dtype = accumulation_dtype(keys, queries)
    row_bytes = columns * dtype.itemsize
    lse = keys.new_empty(heads, rows, dtype=dtype)
    for block in head_blocks(heads, row_bytes, chunk_bytes):
        k = keys[block].to(dtype)
        bias = None if key_bias is None else key_bias[block]
        for chunk in row_blocks(rows, k.shape[0], row_bytes, chunk_bytes):
            lse[block, chunk] = attention_weights(queries[block, chunk].to(dtype), k, bias, scale)[
                1
            ]
    return lse


@accelerated_by("vllm_am.kernels.statistics")
def attention_statistics(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    norms: Sequence[str] = ("rms",),
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> AttentionStatistics:
    """Streamed attention of all queries over all keys, without causality (AM paper, section 3).

    Args:
        keys: [H, T, D]; values: [H, T, Dv]; queries: [H, N, D]; fp16, bf16, fp32 or fp64.
        key_bias: [H, T] or None. -inf hides a key; a head whose keys are all hidden has lse -inf
            and output 0.
        norms: which of ``SCORE_NORMS`` to compute; each costs a pass over the block.
        chunk_bytes: bound of the largest temporary.
    """
    heads, columns, _ = keys.shape
    rows = queries.shape[1]
    dtype = accumulation_dtype(keys, values, queries)
    row_bytes = columns * dtype.itemsize

    lse = keys.new_empty(heads, rows, dtype=dtype)
    output = keys.new_empty(heads, rows, values.shape[-1], dtype=dtype)
    sums = {norm: keys.new_zeros(heads, columns, dtype=dtype) for norm in norms}
    # One tile for all blocks: on a CPU, first touching new memory costs more than the exponentials.
    room = max(columns, min(chunk_bytes // dtype.itemsize, heads * rows * columns))
    scratch = keys.new_empty(room, dtype=dtype)

    for block in head_blocks(heads, row_bytes, chunk_bytes):
        k, v = keys[block].to(dtype), values[block].to(dtype)
        bias = None if key_bias is None else key_bias[block]
        for chunk in row_blocks(rows, k.shape[0], row_bytes, chunk_bytes):
            q = queries[block, chunk].to(dtype)
            shape = (*q.shape[:2], columns)
            tile = scratch[: math.prod(shape)].view(shape)
            squares = sums["rms"][block] if "rms" in sums else None
            weights, lse[block, chunk] = attention_weights(
                q, k, bias, scale, out=tile, squares=squares
            )
            output[block, chunk] = torch.bmm(weights, v)
            if "mean" in sums:
                sums["mean"][block] += weights.sum(dim=1)
            if "max" in sums and columns > 0:
                sums["max"][block] = torch.maximum(sums["max"][block], weights.amax(dim=1))

    scores = dict(sums)
    if "mean" in scores:
        scores["mean"] = sums["mean"] / rows
    if "rms" in scores:
        scores["rms"] = (sums["rms"] / rows).sqrt()
    return AttentionStatistics(lse, output, scores)
