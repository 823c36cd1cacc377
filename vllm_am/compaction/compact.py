"""Compaction of a block of KV cache: select keys, fit their bias, fit their values.

    compacted = compact(keys, values, queries, ratio=0.05)

All heads are one batch. Budgets may differ as they like: heads of similar size are fitted together,
so that nobody pays for the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vllm_am.compaction.arguments import check_arguments, check_budgets
from vllm_am.compaction.candidates import CANDIDATES
from vllm_am.compaction.fitting import Failures, fit, pose, put
from vllm_am.compaction.methods import AS_THEY_ARE, Method
from vllm_am.compaction.problem import Problem
from vllm_am.compaction.quality import FitQuality, compare
from vllm_am.compaction.result import CompactedKV, FitError, empty, take
from vllm_am.compaction.select_keys import top_keys
from vllm_am.compaction.statistics import AttentionStatistics, attention_statistics
from vllm_am.compaction.streaming import DEFAULT_CHUNK_BYTES, to_device

__all__ = ["CompactedKV", "FitError", "compact", "evaluate_fit"]

#: Heads whose budgets differ by less than 2^(1/2) are padded to the largest of them: at most twice
#: the Gram matrix that a head needs. On a GPU by less than 4: there each bucket costs some three
#: hundred launches, and padding little (``benchmarks/results/gpu/README.md``).
BUCKETS_PER_DOUBLING = 2.0
BUCKETS_PER_DOUBLING_ON_GPU = 0.5

#: A head that keeps this share of its keys leaves out those that hardly anybody asks for: a fit
#: costs most there (t^2), and gains least. One probe, without a committed table: on SmolLM2-135M
#: (four tuned texts, default budgets, 10x) all fits take 2.1 s of a core instead of 5.6, 91.4 % of
#: the passages are known instead of 92.1 %, and the KL of the continuation is .0136 for .0131.
LARGE_SHARE = 0.5
#: Fits of fewer slots cost next to nothing, and are made.
LARGE_SLOTS = 768
#: More slots are not fitted either: their Gram matrix alone would take 128 MiB.
MOST_FITTED_SLOTS = 4096


@torch.no_grad()
def compact(
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None,
    *,
    ratio: float | str | None = None,
    budget: int | Tensor | None = None,
    method: str = "highest-attention",
    scale: float | None = None,
    key_bias: Tensor | None = None,
    group_size: int = 1,
    candidates: float | None = CANDIDATES,
    statistics: AttentionStatistics | None = None,
    strict: bool = True,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> CompactedKV:
    """Replace T keys and values per head by fewer, which the queries can hardly tell apart.

    A head whose budget covers all its keys is returned as it is: same keys, values and bias, bit
    for bit, without a fit and without a look at the queries. One that keeps more than
    :data:`LARGE_SLOTS` and half of its keys (:data:`LARGE_SHARE`), or :data:`MOST_FITTED_SLOTS`,
    keeps the most wanted of them as they are. Not where they carry a bias: those slots stand for
    keys that are gone, and what they carry would be lost a little each time.

    Args:
        keys: [H, T, D] and values: [H, T, Dv], as stored in the cache (after RoPE).
        queries: [H, N, D], reference queries, those of a GQA group pooled. All see all keys.
            None or N = 0 if nothing has to be fitted.
        ratio: share of the keys to keep, 0 < ratio <= 1, or a factor such as ``"20x"``;
            ceil(ratio * T) slots per head.
        budget: instead of a ratio, slots to keep per head, one number or [H], each in [0, T].
        method: a name in ``METHODS``.
        scale: of the scores, default 1 / sqrt(D).
        key_bias: [H, T], bias that the keys carry from an earlier compaction; -inf marks keys that
            do not exist (padding), which do not count against the budget.
        group_size: query heads per KV head. N is that many runs of equal length, each in the order
            of positions. Only methods that look at positions (``snapkv``) or that hold out queries
            to choose among alternatives need to know.
        candidates: keys per slot, by rms attention, among which greedy methods (``omp``,
            ``omp-fast``, ``eliminate``) choose; at least 1, None for all keys. Not more than
            2,048 in all, but two per slot (see ``candidates``).
        statistics: of these queries over these keys and values, where the caller has them already,
            with the scores that the method needs (``METHODS[method].needed_norms``).
        strict: raise FitError if any head fails; otherwise failed heads are only marked in ``ok``.
        chunk_bytes: bound of the largest temporary.

    Raises:
        ValueError: an argument is wrong; the message names it.
        FitError: the fit failed in some heads.
    """
    chosen = check_arguments(keys, values, queries, method, scale, key_bias, group_size, candidates)
    if statistics is not None and not set(chosen.needed_norms) <= set(statistics.scores):
        raise ValueError(f"statistics: without the scores {chosen.needed_norms} of {method}")
    heads, columns, width = keys.shape
    budgets = check_budgets(ratio, budget, heads, columns).cpu()
    scale = width**-0.5 if scale is None else float(scale)
    if queries is None:
        queries = keys.new_empty(heads, 0, width)
    existing = torch.full_like(budgets, columns)
    if key_bias is None:
        bias = keys.new_zeros(heads, columns, dtype=torch.float32)
        present = torch.ones_like(bias, dtype=torch.bool)
    else:
        bias = key_bias.float()
        present = ~bias.isneginf()
        existing = present.sum(dim=1).cpu()
    # What decides about shapes is known to the host, and sent to the device without waiting for it.
    budgets = torch.minimum(budgets, existing)
    size = int(budgets.max()) if heads else 0
    whole = budgets == existing  # identity, also for heads that had nothing to begin with
    fitted = torch.where(whole, 0, budgets)

    # One score for all present keys: all of them in a whole head, in their order.
    kept = to_device(budgets - fitted, keys.device)
    result = take(keys, values, bias, top_keys(present.float(), kept, size))
    nothing = to_device((~whole & (budgets == 0)).float(), keys.device)
    result = replace(result, output_error=nothing, mass_error=nothing.clone())

    failures = Failures(heads, keys.device)
    numbers = [head for head, slots in enumerate(fitted.tolist()) if slots > 0]
    if numbers:
        here = _index(numbers, heads, keys.device)
        posed = failures.heads(here)
        if queries.shape[1] == 0:
            posed.add("no-queries", torch.ones_like(posed.ok))
        else:
            problem = pose(
                chosen,
                keys[here],
                values[here],
                queries[here],
                bias[here],
                scale=scale,
                group_size=group_size,
                candidates=candidates,
                statistics=None if statistics is None else statistics.heads(here),
                chunk_bytes=chunk_bytes,
                failures=posed,
            )
            slots = fitted[numbers]
            large = torch.zeros_like(slots, dtype=torch.bool)
            if chosen.fits_values and key_bias is None:
                most = (existing[numbers] * LARGE_SHARE).clamp(LARGE_SLOTS, MOST_FITTED_SLOTS)
                large = slots > most
            for way, these in ((chosen, ~large), (AS_THEY_ARE, large)):
                if bool(these.any()):
                    result = _fit_alike(way, problem, slots, these, numbers, result, posed)
        failures.put(here, posed)
    if strict:
        failures.raise_first()
        return result
    return _without_failed(result, failures.ok)


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
    check_arguments(keys, values, queries, "highest-attention", scale, key_bias)
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


def _fit_alike(
    method: Method,
    problem: Problem,
    budgets: Tensor,
    these: Tensor,
    numbers: list[int],
    result: CompactedKV,
    failures: Failures,
) -> CompactedKV:
    """Fit some heads of a problem, those of similar budgets together; ``result`` with them in it.

    Args:
        budgets: [h] int64 on the host, of all h heads of the problem.
        these: [h] bool on the host: which are fitted.
        numbers: of the h heads, in ``result``.
        failures: of the h heads, added to.
    """
    device, heads = problem.keys.device, len(result.keys)
    steps = BUCKETS_PER_DOUBLING if device.type == "cpu" else BUCKETS_PER_DOUBLING_ON_GPU
    for bucket in _buckets(budgets.tolist(), these.nonzero().squeeze(1).tolist(), steps):
        alike = budgets[bucket]
        size = int(alike.max())
        whole = len(bucket) == len(numbers)  # nothing to be copied
        here = _index(bucket, len(numbers), device)
        failed = failures.heads(here)
        chosen = problem if whole else problem.heads(here)
        part = fit(method, chosen, to_device(alike, device), size, failed)
        failures.put(here, failed)
        if whole and len(numbers) == heads:
            return part
        put(result, _index([numbers[i] for i in bucket], heads, device), part)
    return result


def _buckets(budgets: list[int], these: list[int], steps: float) -> Iterator[list[int]]:
    """Heads to be fitted together, of ``these``: ``steps`` buckets per doubling of the budget."""
    sizes = {head: math.floor(math.log2(budgets[head]) * steps) for head in these}
    for size in sorted(set(sizes.values())):
        yield [head for head in these if sizes[head] == size]


def _index(numbers: list[int], heads: int, device: torch.device) -> Tensor | slice:
    """What picks these of so many heads: the tensors themselves, not copies, where it is all."""
    return slice(None) if len(numbers) == heads else to_device(torch.tensor(numbers), device)


def _without_failed(result: CompactedKV, ok: Tensor) -> CompactedKV:
    """Failed heads become empty, with NaN errors."""
    failed = (~ok).nonzero().squeeze(1)
    if failed.numel() > 0:
        void = empty(result.keys[failed], result.values[failed], result.keys.shape[1])
        nan = torch.full_like(void.output_error, torch.nan)
        marks = torch.zeros_like(void.ok)
        put(
            result,
            failed,
            replace(void, output_error=nan, mass_error=nan, kkt_residual=nan, ok=marks),
        )
    return result
