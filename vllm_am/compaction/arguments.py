"""Malformed arguments are refused before any work, by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_am.compaction.methods import METHODS, Method
from vllm_am.compaction.ratio import share_kept


def check_arguments(
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None,
    method: str,
    scale: float | None,
    key_bias: Tensor | None,
    group_size: int = 1,
    candidates: float | None = None,
) -> Method:
    """Refuse malformed arguments before any work; returns the method."""
    if method not in METHODS:
        raise ValueError(f"method: unknown {method!r}, known are {', '.join(sorted(METHODS))}")
    for name, tensor in (("keys", keys), ("values", values), ("queries", queries)):
        if tensor is None and name == "queries":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor")
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.device != keys.device:
            raise ValueError(f"{name}: on {tensor.device}, but keys are on {keys.device}")
    heads, columns, width = keys.shape
    if width == 0:
        raise ValueError("keys: head dimension is 0")
    if values.shape[:2] != (heads, columns):
        raise ValueError(
            f"values: shape {tuple(values.shape)} does not match keys {tuple(keys.shape)}"
        )
    if queries is not None and (queries.shape[0] != heads or queries.shape[2] != width):
        raise ValueError(
            f"queries: shape {tuple(queries.shape)} does not match keys {tuple(keys.shape)}"
        )
    if group_size < 1 or (queries is not None and queries.shape[1] % group_size != 0):
        raise ValueError(
            f"group_size: expected a divisor of the number of queries, got {group_size}"
        )
    if candidates is not None and not candidates >= 1:
        raise ValueError(f"candidates: expected at least 1 per slot, or None, got {candidates}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if key_bias is not None:
        if not isinstance(key_bias, Tensor) or not key_bias.is_floating_point():
            raise ValueError("key_bias: expected a floating-point tensor")
        if key_bias.shape != (heads, columns) or key_bias.device != keys.device:
            raise ValueError(
                f"key_bias: expected shape {(heads, columns)} on {keys.device}, got "
                f"{tuple(key_bias.shape)} on {key_bias.device}"
            )
    return METHODS[method]


def check_budgets(
    ratio: float | str | None, budget: int | Tensor | None, heads: int, columns: int
) -> Tensor:
    """[H] int64, from exactly one of the two."""
    if (ratio is None) == (budget is None):
        raise ValueError("ratio, budget: exactly one of the two is needed")
    if ratio is not None:
        try:
            share = share_kept(ratio)
        except ValueError as error:
            raise ValueError(f"ratio: {error}; got {ratio!r}") from None
        # 0.07 * 100 is 7.000000000000001 in binary and must not become 8.
        slots = max(1, math.ceil(round(share * columns, 6))) if columns else 0
        return torch.full((heads,), slots, dtype=torch.int64)
    if isinstance(budget, Tensor):
        if budget.is_floating_point() or budget.is_complex() or budget.dtype == torch.bool:
            raise ValueError(f"budget: expected integers, got {budget.dtype}")
        if budget.shape != (heads,):
            raise ValueError(f"budget: expected shape {(heads,)}, got {tuple(budget.shape)}")
        budgets = budget.to(torch.int64)
    elif isinstance(budget, int) and not isinstance(budget, bool):
        budgets = torch.full((heads,), budget, dtype=torch.int64)
    else:
        raise ValueError(f"budget: expected an int or an int tensor, got {type(budget).__name__}")
    if heads and not (int(budgets.min()) >= 0 and int(budgets.max()) <= columns):
        raise ValueError(
            f"budget: expected 0 <= budget <= {columns} keys, got {int(budgets.min())} to "
            f"{int(budgets.max())}"
        )
    return budgets
