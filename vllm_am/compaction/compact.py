"""Compaction of a block of KV cache: select keys, fit their bias, fit their values.

    compacted = compact(keys, values, queries, ratio=0.05)

All heads are one batch, and no head can spoil another: a head that fails is marked, its inputs
are replaced by zeros, and the rest go on with exactly the numbers they would have had.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_am.compaction.fit_bias import fit_bias
from vllm_am.compaction.fit_values import fit_values
from vllm_am.compaction.methods import METHODS, Method, Problem
from vllm_am.compaction.quality import FitQuality, compare
from vllm_am.compaction.select_keys import gather_keys, top_keys
from vllm_am.compaction.statistics import AttentionStatistics, attention_statistics
from vllm_am.compaction.streaming import DEFAULT_CHUNK_BYTES


class FitError(ArithmeticError):
    """The numbers of some heads could not be fitted; the arguments themselves were fine.

    Attributes:
        reason: "non-finite" (NaN or Inf in inputs or results), "no-queries", "singular" or
            "no-mass" (no query gives the kept keys any weight); the first that occurred.
        heads: the heads it occurred in.
    """

    def __init__(self, reason: str, heads: Iterable[int]) -> None:
        self.reason = reason
        self.heads = tuple(heads)
        shown = ", ".join(map(str, self.heads[:8])) + (", ..." if len(self.heads) > 8 else "")
        super().__init__(f"{reason}: compaction failed in {len(self.heads)} head(s): {shown}")


@dataclass(frozen=True)
class CompactedKV:
    """A compacted block. Head h consists of the first ``lengths[h]`` slots, the rest is padding.

    Attributes:
        keys: [H, t, D], exact copies of original rows in their dtype; zeros in padding.
        bias: [H, t] float32, to be added to scale * q.k; -inf in padding.
        values: [H, t, Dv], dtype of the original values; zeros in padding.
        lengths: [H] int64. The logical number of tokens is not here: positions do not change.
        indices: [H, t] int64, ascending rows of the original block; -1 in padding.
        output_error: [H] float32, mean relative error on the queries of the fit.
        mass_error: [H] float32, mean |mass ratio - 1| on the queries of the fit.
        kkt_residual: [H] float32, optimality of the bias fit (see ``fit_bias.solve_box``).
        ok: [H] bool. A head that failed has length 0 and NaN errors; do not use it.
    """

    keys: Tensor
    bias: Tensor
    values: Tensor
    lengths: Tensor
    indices: Tensor
    output_error: Tensor
    mass_error: Tensor
    kkt_residual: Tensor
    ok: Tensor


@torch.no_grad()
def compact(
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None,
    *,
    ratio: float | None = None,
    budget: int | Tensor | None = None,
    method: str = "highest-attention",
    scale: float | None = None,
    key_bias: Tensor | None = None,
    strict: bool = True,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> CompactedKV:
    """Replace T keys and values per head by fewer, which the queries can hardly tell apart.

    A head whose budget covers all its keys is returned as it is: same keys, values and bias, bit
    for bit, without a fit and without a look at the queries.

    Args:
        keys: [H, T, D] and values: [H, T, Dv], as stored in the cache (after RoPE).
        queries: [H, N, D], reference queries, those of a GQA group pooled. All see all keys.
            None or N = 0 if nothing has to be fitted.
        ratio: share of the keys to keep, 0 < ratio <= 1; ceil(ratio * T) slots per head.
        budget: instead of a ratio, slots to keep per head, one number or [H], each in [0, T].
        method: a name in ``METHODS``.
        scale: of the scores, default 1 / sqrt(D).
        key_bias: [H, T], bias that the keys carry from an earlier compaction; -inf marks keys that
            do not exist (padding), which do not count against the budget.
        strict: raise FitError if any head fails; otherwise failed heads are only marked in ``ok``.
        chunk_bytes: bound of the largest temporary.

    Raises:
        ValueError: an argument is wrong; the message names it.
        FitError: the fit failed in some heads.
    """
    chosen = _check(keys, values, queries, method, scale, key_bias)
    heads, columns, width = keys.shape
    budgets = _budgets(ratio, budget, heads, columns).to(keys.device)
    scale = width**-0.5 if scale is None else float(scale)
    if queries is None:
        queries = keys.new_empty(heads, 0, width)
    bias = keys.new_zeros(heads, columns, dtype=torch.float32) if key_bias is None else key_bias
    bias = bias.float()

    present = ~bias.isneginf()
    existing = present.sum(dim=1)
    budgets = torch.minimum(budgets, existing)
    size = int(budgets.max()) if heads else 0
    whole = budgets == existing  # identity, also for heads that had nothing to begin with
    fitted = (budgets > 0) & ~whole

    # One score for all present keys: all of them in a whole head, in their order.
    indices = top_keys(present.float(), torch.where(whole, budgets, 0), size)
    result = _take(keys, values, bias, indices)
    nothing = (~whole & (budgets == 0)).float()
    result = replace(result, output_error=nothing, mass_error=nothing.clone())
    if not bool(fitted.any()):
        return result

    failures = _Failures(fitted)
    fit = _fit(chosen, keys, values, queries, bias, budgets, size, scale, chunk_bytes, failures)
    if strict:
        failures.raise_first()
    return _drop_failed(_where(fitted, fit, result), failures.ok)


@torch.no_grad()
def evaluate_fit(
    compacted: CompactedKV,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> FitQuality:
    """Errors of a compacted block against the original, on queries that were not used for the fit.

    Args:
        compacted: of ``keys`` [H, T, D], ``values`` [H, T, Dv] and ``key_bias`` [H, T].
        queries: [H, N, D], N >= 1.
        scale: as in ``compact``.
    """
    _check(keys, values, queries, "highest-attention", scale, key_bias)
    if queries.shape[1] == 0:
        raise ValueError("queries: at least one is needed to evaluate a fit")
    if compacted.keys.shape[0] != keys.shape[0]:
        raise ValueError(
            f"compacted: has {compacted.keys.shape[0]} heads, keys have {keys.shape[0]}"
        )
    scale = keys.shape[2] ** -0.5 if scale is None else float(scale)
    return compare(
        attention_statistics(
            keys,
            values,
            queries,
            scale=scale,
            key_bias=key_bias,
            norms=(),
            chunk_bytes=chunk_bytes,
        ),
        attention_statistics(
            compacted.keys,
            compacted.values,
            queries,
            scale=scale,
            key_bias=compacted.bias,
            norms=(),
            chunk_bytes=chunk_bytes,
        ),
    )


class _Failures:
    """Which heads failed, and why. A head counts once, under its first reason."""

    def __init__(self, relevant: Tensor) -> None:
        self.relevant = relevant
        self.ok = torch.ones_like(relevant)
        self.reasons: list[tuple[str, Tensor]] = []

    def add(self, reason: str, failed: Tensor) -> None:
        new = failed & self.relevant & self.ok
        self.ok = self.ok & ~new
        self.reasons.append((reason, new))

    def raise_first(self) -> None:
        for reason, failed in self.reasons:
            heads = failed.nonzero().flatten().tolist()
            if heads:
                raise FitError(reason, heads)


def _fit(
    method: Method,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    bias: Tensor,
    budgets: Tensor,
    size: int,
    scale: float,
    chunk_bytes: int,
    failures: _Failures,
) -> CompactedKV:
    """The three stages, for heads in ``failures.relevant``; the other heads' content is void."""
    present = ~bias.isneginf()
    if queries.shape[1] == 0:
        failures.add("no-queries", torch.ones_like(failures.ok))
        return _empty(keys, values, size)

    # -inf is how a bias marks a missing key.
    failures.add("non-finite", ~_finite(keys, values, queries, bias.masked_fill(~present, 0.0)))
    keys, values, queries = (_mute(x, failures.ok) for x in (keys, values, queries))
    bias = torch.where(failures.ok.unsqueeze(1), bias, 0.0)

    statistics = attention_statistics(
        keys,
        values,
        queries,
        scale=scale,
        key_bias=bias,
        norms=method.norms,
        chunk_bytes=chunk_bytes,
    )
    # Finite inputs may still overflow in q.k or in the sum over values.
    failures.add("no-mass", statistics.lse.isneginf().any(dim=1))
    failures.add("non-finite", ~_finite(statistics.lse, statistics.output))
    if not bool(failures.ok.all()):
        queries = _mute(queries, failures.ok)
        statistics = AttentionStatistics(
            _mute(statistics.lse, failures.ok),
            _mute(statistics.output, failures.ok),
            {norm: _mute(score, failures.ok) for norm, score in statistics.scores.items()},
        )

    problem = Problem(keys, values, queries, bias, scale, statistics, chunk_bytes)
    wanted = torch.where(failures.relevant & failures.ok, budgets, 0)
    fit = _take(keys, values, bias, method.select(problem, wanted, size))

    if method.log_weight_bounds is not None:
        mass = fit_bias(
            fit.keys,
            fit.bias,
            queries,
            statistics.lse,
            scale=scale,
            log_bounds=method.log_weight_bounds,
            chunk_bytes=chunk_bytes,
        )
        failures.add("no-mass", mass.no_mass)
        fit = replace(fit, bias=mass.bias, kkt_residual=mass.kkt_residual.float())
    if method.fits_values:
        solution, singular = fit_values(
            fit.keys,
            fit.bias,
            fit.values,
            queries,
            statistics.output,
            scale=scale,
            chunk_bytes=chunk_bytes,
        )
        failures.add("singular", singular)
        fit = replace(fit, values=solution.to(values.dtype))
        failures.add("non-finite", ~_finite(fit.values))

    reached = attention_statistics(
        fit.keys,
        fit.values,
        queries,
        scale=scale,
        key_bias=fit.bias,
        norms=(),
        chunk_bytes=chunk_bytes,
    )
    errors = compare(statistics, reached)
    failures.add("non-finite", ~_finite(errors.output_error, errors.mass_error))
    return replace(fit, output_error=errors.output_error, mass_error=errors.mass_error)


def _finite(*tensors: Tensor) -> Tensor:
    """[H] bool, whether all numbers of a head are finite in all tensors [H, ...]."""
    good = [tensor.isfinite().reshape(len(tensor), -1).all(dim=1) for tensor in tensors]
    return torch.stack(good).all(dim=0)


def _mute(tensor: Tensor, ok: Tensor) -> Tensor:
    """Zeros in failed heads; the tensor itself, not a copy, if there are none."""
    if bool(ok.all()):
        return tensor
    return tensor.masked_fill(~ok.view(-1, *[1] * (tensor.dim() - 1)), 0)


def _take(keys: Tensor, values: Tensor, bias: Tensor, indices: Tensor) -> CompactedKV:
    """The chosen rows with the bias they carry, and zero errors."""
    kept_bias = gather_keys(bias.unsqueeze(2), indices).squeeze(2)
    return replace(
        _empty(keys, values, indices.shape[1]),
        keys=gather_keys(keys, indices),
        bias=kept_bias.masked_fill(indices < 0, -torch.inf),
        values=gather_keys(values, indices),
        lengths=(indices >= 0).sum(dim=1),
        indices=indices,
    )


def _empty(keys: Tensor, values: Tensor, size: int) -> CompactedKV:
    """Heads of length 0 with ``size`` slots of padding."""
    heads = keys.shape[0]
    zeros = keys.new_zeros(heads, dtype=torch.float32)
    return CompactedKV(
        keys=keys.new_zeros(heads, size, keys.shape[2]),
        bias=keys.new_full((heads, size), -torch.inf, dtype=torch.float32),
        values=values.new_zeros(heads, size, values.shape[2]),
        lengths=keys.new_zeros(heads, dtype=torch.int64),
        indices=keys.new_full((heads, size), -1, dtype=torch.int64),
        output_error=zeros,
        mass_error=zeros.clone(),
        kkt_residual=zeros.clone(),
        ok=keys.new_ones(heads, dtype=torch.bool),
    )


def _where(condition: Tensor, a: CompactedKV, b: CompactedKV) -> CompactedKV:
    """Per head, ``a`` where the condition [H] holds, else ``b``."""

    def pick(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(condition.view(-1, *[1] * (x.dim() - 1)), x, y)

    names = CompactedKV.__dataclass_fields__
    return CompactedKV(**{name: pick(getattr(a, name), getattr(b, name)) for name in names})


def _drop_failed(result: CompactedKV, ok: Tensor) -> CompactedKV:
    """Failed heads become empty, with NaN errors."""
    if bool(ok.all()):
        return result
    void = _empty(result.keys, result.values, result.keys.shape[1])
    nan = torch.full_like(void.output_error, torch.nan)
    void = replace(
        void, output_error=nan, mass_error=nan, kkt_residual=nan, ok=torch.zeros_like(ok)
    )
    return _where(ok, result, void)


def _check(
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None,
    method: str,
    scale: float | None,
    key_bias: Tensor | None,
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


def _budgets(ratio: float | None, budget: int | Tensor | None, heads: int, columns: int) -> Tensor:
    """[H] int64, from exactly one of the two."""
    if (ratio is None) == (budget is None):
        raise ValueError("ratio, budget: exactly one of the two is needed")
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: expected 0 < ratio <= 1, got {ratio}")
        # 0.07 * 100 is 7.000000000000001 in binary and must not become 8.
        slots = max(1, math.ceil(round(ratio * columns, 6))) if columns else 0
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
