"""The output fit: values that reproduce the original outputs under the compacted weights.

With X_i = softmax_j(scale q_i.k_j + b_j) over the kept keys and Y_i the original output,

    C = argmin  sum_i |Y_i|^-p |X_i C - Y_i|^2  +  r |C - V_S|^2 .

The paper (section 3) has p = 0 and r = 0. Both constants below were chosen by held-out errors on
the synthetic heads of ``tests/compaction/synthetic.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_am.compaction.accelerate import accelerated_by
from vllm_am.compaction.attend import attention_weights
from vllm_am.compaction.gram import gram_matrix
from vllm_am.compaction.streaming import (
    DEFAULT_CHUNK_BYTES,
    accumulation_dtype,
    gram_blocks,
    head_blocks,
    row_blocks,
)

#: p above. Plain least squares (0) lets the few queries with large outputs dominate; the relative
#: error itself (2) gains little over a small power and gives those queries up.
OUTPUT_WEIGHT_POWER = 0.5

#: Least and largest ridge, relative to the mean diagonal of the Gram matrix; see ``ridge_for``.
RIDGE_RANGE = (1e-6, 1e-1)


def ridge_for(queries: int, lengths: Tensor) -> Tensor:
    """Relative ridge for fits of ``lengths[h]`` slots on n queries: 1e-5 (4 t / n)^6 within range.

    With n near t, unregularised least squares explodes on held-out queries (double descent,
    ``tests/compaction/test_fit_values.py``); with n >= 8 t a larger ridge only costs accuracy. The
    power goes from one to the other as the best ridge does.
    """
    crowding = 4.0 * lengths.double() / max(queries, 1)
    return (1e-5 * crowding**6).clamp(*RIDGE_RANGE)


@accelerated_by("vllm_am.kernels.solve_values", double=True)
def solve_values(
    gram: Tensor, rhs: Tensor, prior: Tensor, ridge: Tensor | float
) -> tuple[Tensor, Tensor]:
    """(G + r I)^-1 (rhs + r prior) with r = ridge * mean of the used diagonal of G, by Cholesky.

    Args:
        gram: [H, t, t]; rows and columns of padding are zero.
        rhs, prior: [H, t, Dv].
        ridge: relative ridge, [H] or one number.

    Returns:
        solution [H, t, Dv] and singular [H] bool; a singular head's solution is 0, and it does not
        touch the other heads. A slot with a zero diagonal keeps its prior value.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    used = diagonal > 0
    mean = diagonal.sum(dim=1) / used.sum(dim=1).clamp(min=1)
    shift = torch.where(used, (ridge * mean).unsqueeze(1), 1.0)  # [H, t]
    factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(shift))
    singular = info != 0
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factor = torch.where(singular.view(-1, 1, 1), identity, factor)
    solution = torch.cholesky_solve(rhs + shift.unsqueeze(2) * prior, factor)
    return solution.masked_fill(singular.view(-1, 1, 1), 0.0), singular


def fit_values(
    keys: Tensor,
    bias: Tensor,
    prior: Tensor,
    queries: Tensor,
    output: Tensor,
    *,
    scale: float,
    weights: Tensor | None = None,
    anchored: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Values of the kept keys, by batched weighted least squares on the normal equations.

    Args:
        keys: [H, t, D], kept keys as they will be stored.
        bias: [H, t], the final bias as it will be stored, -inf in padding. Fitting with any other
            bias is an error that only held-out queries show.
        prior: [H, t, Dv], the original values of the kept keys, which the ridge pulls towards.
        queries: [H, n, D]. output: [H, n, Dv], their original outputs.
        weights: [n], of the queries' squares in the sum, at most 1; None is 1.
        anchored: [H, t] bool or None, slots that keep their prior value; the others are fitted to
            what these leave of the outputs.

    Returns:
        values [H, t, Dv] in fp64 and singular [H] bool (see ``solve_values``).
    """
    lengths = (~bias.isneginf()).sum(dim=1)
    ridge = ridge_for(queries.shape[1], lengths)
    values = torch.empty_like(prior, dtype=torch.float64)
    singular = torch.zeros_like(lengths, dtype=torch.bool)
    for heads in gram_blocks(len(bias), bias.shape[1], chunk_bytes, bias.device):
        gram, rhs = output_normal_equations(
            keys[heads],
            bias[heads],
            queries[heads],
            output[heads],
            scale=scale,
            row_weights=weights,
            chunk_bytes=chunk_bytes,
        )
        start = prior[heads].double()
        if anchored is not None:
            gram, rhs = _without_anchored(gram, rhs, start, anchored[heads])
        values[heads], singular[heads] = solve_values(gram, rhs, start, ridge[heads])
    return values, singular


def _without_anchored(
    gram: Tensor, rhs: Tensor, prior: Tensor, anchored: Tensor
) -> tuple[Tensor, Tensor]:
    """Normal equations of the other slots, with the anchored ones as slots that nobody sees."""
    known = anchored.unsqueeze(2)
    rhs = (rhs - torch.bmm(gram, prior * known)).masked_fill(known, 0.0)
    return gram.masked_fill(known | known.transpose(1, 2), 0.0), rhs


@accelerated_by("vllm_am.kernels.gram")
def output_normal_equations(
    keys: Tensor,
    bias: Tensor,
    queries: Tensor,
    output: Tensor,
    *,
    scale: float,
    row_weights: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """X'WX [H, t, t] and X'WY [H, t, Dv], products in the accumulation dtype, sums in fp64.

    Args:
        row_weights: [n], at most 1, of all heads, which W holds beside |Y|^-p; None is 1.
    """
    heads, size, _ = keys.shape
    rows = queries.shape[1]
    dtype = accumulation_dtype(keys, queries, output)
    gram = keys.new_zeros(heads, size, size, dtype=torch.float64)
    rhs = keys.new_zeros(heads, size, output.shape[-1], dtype=torch.float64)
    roots = output_row_weights(output, row_weights)
    row_bytes = size * dtype.itemsize
    for block in head_blocks(heads, row_bytes, chunk_bytes):
        k, b = keys[block].to(dtype), bias[block]
        for chunk in row_blocks(rows, k.shape[0], row_bytes, chunk_bytes):
            x, _ = attention_weights(queries[block, chunk].to(dtype), k, b, scale)
            root = roots[block, chunk].to(dtype)
            x *= root
            gram[block] += gram_matrix(x)
            rhs[block] += torch.bmm(x.transpose(1, 2), output[block, chunk].to(dtype) * root)
    return gram, rhs


def output_row_weights(output: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """[H, n, 1], square roots of the weights |Y_i|^-p, with |Y| floored at 1/100 of its mean.

    Args:
        row_weights: [n], of which the weights are multiples; None is 1.
    """
    norm = torch.linalg.vector_norm(output, dim=2, keepdim=True)
    mean = norm.mean(dim=1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    roots = torch.pow((norm / mean).clamp(min=1e-2), -OUTPUT_WEIGHT_POWER / 2)
    return roots if row_weights is None else roots * row_weights.sqrt().unsqueeze(1)
