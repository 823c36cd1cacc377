"""Attention with a per-key bias, in plain torch: the reference beside which kernels are tested.

A compacted prefix and the live tokens behind it are attended separately and merged; the merge is
exact because softmax over a union is the mass-weighted mean of the softmaxes over its parts.
Leading dimensions are free; ``H`` below stands for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_am.compaction.accelerate import compiled_by
from vllm_am.compaction.streaming import accumulation_dtype


def shifted_exponentials(
    queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(s - max s) with s_ij = scale q_i.k_j + b_j, the shift max s, and the sum over keys.

    Args:
        queries: [H, N, D], keys: [H, T, D], both already in the accumulation dtype.
        bias: [H, T] or None; -inf hides a key.
        mask: bool, broadcastable to [H, N, T], True where a query sees a key; or None.

    Returns:
        exponentials [H, N, T], shift [H, N, 1] and total [H, N, 1]. A row that sees no key has
        total 0 and shift 0 rather than NaN.
    """
    scores = torch.matmul(queries * scale, keys.transpose(-1, -2))
    if bias is not None:
        scores += bias.to(scores.dtype).unsqueeze(-2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if scores.shape[-1] == 0:  # amax has no identity
        zeros = scores.new_zeros(*scores.shape[:-1], 1)
        return scores, zeros, zeros.clone()
    shift = scores.amax(dim=-1, keepdim=True)
    shift = torch.where(shift == -torch.inf, 0.0, shift)
    exponentials = scores.sub_(shift).exp_()
    return exponentials, shift, exponentials.sum(dim=-1, keepdim=True)


def attention_weights(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    scale: float,
    *,
    out: Tensor | None = None,
    squares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A_ij = exp(s_ij - lse_i) with s_ij = scale q_i.k_j + b_j, and lse_i = log sum_j exp(s_ij).

    Args:
        queries: [H, N, D], keys: [H, T, D], both already in the accumulation dtype.
        bias: [H, T] or None; -inf hides a key.
        out: [H, N, T], contiguous, for the weights. Fresh memory may cost more than the arithmetic,
            so callers in a loop bring their own.
        squares: see :func:`weigh_scores`.

    Returns:
        weights [H, N, T] and lse [H, N]. A row that sees no key has weights 0 and lse -inf.
    """
    weights = torch.bmm(queries * scale, keys.transpose(1, 2), out=out)
    return weights, weigh_scores(weights, bias, squares)


@compiled_by("vllm_am.kernels.weigh_scores")
def weigh_scores(scores: Tensor, bias: Tensor | None, squares: Tensor | None = None) -> Tensor:
    """Turn scores into attention weights, in their own memory.

    Args:
        scores: [H, N, T]; become the weights.
        bias: [H, T], added to the scores, or None.
        squares: [H, T] or None; sum_i A_ij^2 is added to it.

    Returns:
        lse [H, N].
    """
    if scores.shape[2] == 0:  # amax has no identity
        return scores.new_full(scores.shape[:2], -torch.inf)
    if bias is not None:
        scores += bias.to(scores.dtype).unsqueeze(1)
    shift = scores.amax(dim=2)
    # One fused softmax: half the time of ``shifted_exponentials``, whose shift and sum are passes.
    torch.softmax(scores, dim=2, out=scores)
    # The largest weight is exp(0) / total.
    lse = shift - scores.amax(dim=2).log()
    blind = shift == -torch.inf
    if bool(blind.any()):
        scores.masked_fill_(blind.unsqueeze(2), 0.0)
        lse.masked_fill_(blind, -torch.inf)
    if squares is not None:
        squares += torch.linalg.vector_norm(scores, dim=1).square_()
    return lse


def safe_reciprocal(total: Tensor) -> Tensor:
    """1 / total, and 0 where total is 0: a query that sees no key gets the output 0."""
    return torch.where(total == 0, 0.0, total.reciprocal())


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp, accumulated in fp32 (fp64 for fp64 inputs).

    Args:
        queries: [H, N, D]; keys: [H, T, D]; values: [H, T, Dv].
        bias: [H, T], added after scaling; -inf marks padding. None is zero.
        scale: default 1 / sqrt(D).
        mask: bool, broadcastable to [H, N, T], True = visible; see ``causal_mask``.

    Returns:
        output [H, N, Dv] and lse [H, N]; a query that sees no key gets 0 and -inf.
    """
    dtype = accumulation_dtype(queries, keys, values)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    weights, shift, total = shifted_exponentials(
        queries.to(dtype), keys.to(dtype), bias, scale, mask
    )
    output = torch.matmul(weights, values.to(dtype)) * safe_reciprocal(total)
    return output, (shift + total.log()).squeeze(-1)


def causal_mask(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """[rows, columns] bool: the queries are the last ``rows`` of ``columns`` tokens."""
    mask = torch.ones(rows, columns, dtype=torch.bool, device=device)
    return mask.tril(diagonal=columns - rows)


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets, from the attention over each of them.

    With the weights a_p = exp(lse_p - lse), out = sum_p a_p out_p is exact.

    Args:
        outputs: parts of [H, N, Dv]; lses: parts of [H, N]. A part that saw no key has lse -inf
            and takes no share, whatever its output is (finite or not).

    Returns:
        output [H, N, Dv] and lse [H, N]; where all parts are empty, 0 and -inf.
    """
    stacked = torch.stack(tuple(lses))  # [P, H, N]
    shift = stacked.amax(dim=0)
    shift = torch.where(shift == -torch.inf, 0.0, shift)
    shares = torch.exp(stacked - shift)
    total = shares.sum(dim=0)
    weights = (shares * safe_reciprocal(total)).unsqueeze(-1)
    parts = torch.stack(tuple(outputs))
    merged = torch.where(weights == 0, 0.0, weights * parts).sum(dim=0)
    return merged, shift + total.log()
