"""The stages of a fit, for a batch of heads: select keys, fit their bias, fit their values.

No head can spoil another: a head that fails is noted, its inputs are replaced by zeros, and the
rest go on with exactly the numbers they would have had.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vllm_am.compaction.fit_bias import fit_bias
from vllm_am.compaction.fit_values import fit_values
from vllm_am.compaction.methods import Method
from vllm_am.compaction.problem import Problem
from vllm_am.compaction.quality import compare
from vllm_am.compaction.result import CompactedKV, FitError, empty, take
from vllm_am.compaction.sample_queries import ReferenceQueries, evenly_drawn, sample_queries
from vllm_am.compaction.statistics import AttentionStatistics, attention_statistics

#: Why a head can fail (see ``FitError``), behind what stands for "it did not".
REASONS = ("", "non-finite", "no-queries", "singular", "no-mass")

#: Of every so many positions one is held out while a method chooses among its alternatives.
HELDOUT_EVERY = 4
#: Positions that are held out together: neighbours' queries are too alike to be on both sides.
HELDOUT_RUN = 16
#: Weight of the mass error beside the output error in that choice.
MASS_ERROR_WEIGHT = 0.5


class Failures:
    """Why heads failed: the first reason of each. On the device, where nobody has to wait for it.

    Attributes:
        codes: int64 [H], place in ``REASONS``; 0 for a head that did not fail.
    """

    def __init__(self, heads: int, device: torch.device) -> None:
        self.codes = torch.zeros(heads, dtype=torch.int64, device=device)

    @property
    def ok(self) -> Tensor:
        """bool [H]."""
        return self.codes == 0

    def add(self, reason: str, failed: Tensor) -> None:
        """These heads [H] have failed, unless they had before."""
        self.codes = torch.where(failed & self.ok, REASONS.index(reason), self.codes)

    def heads(self, index: Tensor | slice) -> Failures:
        """Of some of the heads, to be added to by themselves; see :meth:`put`."""
        part = Failures(0, self.codes.device)
        part.codes = self.codes[index]
        return part

    def put(self, index: Tensor | slice, part: Failures) -> None:
        """Take over what became of some of the heads."""
        self.codes[index] = part.codes

    def raise_first(self) -> None:
        """FitError for the first head that failed and all that share its reason. Waits."""
        codes = self.codes.tolist()
        first = next((code for code in codes if code), 0)
        if first:
            raise FitError(REASONS[first], [h for h, code in enumerate(codes) if code == first])


def pose(
    method: Method,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    bias: Tensor,
    *,
    scale: float,
    group_size: int,
    candidates: float | None,
    statistics: AttentionStatistics | None,
    chunk_bytes: int,
    failures: Failures,
) -> Problem:
    """Look at the heads before any is fitted: what is not finite fails here, and is muted.

    Args:
        keys: [H, T, D], values: [H, T, Dv], queries: [H, N, D], N >= 1, bias: [H, T] float32.
        statistics: of these queries over these keys, if they are known.
        failures: of these heads, added to.
    """
    # -inf is how a bias marks a missing key.
    present = ~bias.isneginf()
    failures.add("non-finite", ~_finite(keys, values, queries, bias.masked_fill(~present, 0.0)))
    if statistics is None:
        statistics = attention_statistics(
            keys,
            values,
            queries,
            scale=scale,
            key_bias=bias,
            norms=method.needed_norms,
            chunk_bytes=chunk_bytes,
        )
    # Finite inputs may still overflow in q.k or in the sum over values.
    failures.add("no-mass", statistics.lse.isneginf().any(dim=1))
    failures.add("non-finite", ~_finite(statistics.lse, statistics.output))
    # The one question in the middle of a fit: copies of everything would cost more than the answer.
    if not bool(failures.ok.all()):
        keys, values, queries = (_mute(x, failures.ok) for x in (keys, values, queries))
        bias = _mute(bias, failures.ok)
        statistics = AttentionStatistics(
            _mute(statistics.lse, failures.ok),
            _mute(statistics.output, failures.ok),
            {norm: _mute(score, failures.ok) for norm, score in statistics.scores.items()},
        )
    return Problem(
        keys, values, queries, bias, scale, group_size, statistics, candidates, chunk_bytes
    )


def fit(
    method: Method, problem: Problem, budgets: Tensor, size: int, failures: Failures
) -> CompactedKV:
    """Compact every head to its budget; the content of heads in ``failures`` is void.

    Args:
        budgets: [H] int64, each at least 1 and less than the number of present keys.
        size: their maximum, slots of the result.
        failures: of these heads so far, added to.
    """
    budgets = torch.where(failures.ok, budgets, 0)
    if not method.alternatives:
        return _solve(method, problem, budgets, size, failures)
    choice = _choose(method.alternatives, problem, budgets, size)
    result = empty(problem.keys, problem.values, size)
    for number, each in enumerate(method.alternatives):
        heads = (choice == number).nonzero().squeeze(1)
        if heads.numel() == 0:
            continue
        part_failures = failures.heads(heads)
        part = _solve(each, problem.heads(heads), budgets[heads], size, part_failures)
        put(result, heads, part)
        failures.put(heads, part_failures)
    return result


def put(result: CompactedKV, heads: Tensor | slice, part: CompactedKV) -> None:
    """Write ``part`` [len(heads), t'] into ``result`` [H, t >= t'], in place."""
    for name in CompactedKV.__dataclass_fields__:
        target, source = getattr(result, name), getattr(part, name)
        if target.dim() == 1:
            target[heads] = source
        else:
            target[heads, : source.shape[1]] = source


def _solve(
    method: Method, problem: Problem, budgets: Tensor, size: int, failures: Failures
) -> CompactedKV:
    """The three stages and the errors on the queries of the fit."""
    selection = method.select(problem, budgets, size)
    scale, chunk_bytes = problem.scale, problem.chunk_bytes
    result = take(problem.keys, problem.values, problem.bias, selection.indices)
    reference = _reference(method, problem, result)
    if method.log_weight_bounds is not None:
        mass = fit_bias(
            result.keys,
            result.bias,
            reference.queries,
            reference.lse,
            scale=scale,
            weights=reference.weights,
            log_bounds=method.log_weight_bounds,
            chunk_bytes=chunk_bytes,
        )
        failures.add("no-mass", mass.no_mass)
        result = replace(result, bias=mass.bias, kkt_residual=mass.kkt_residual.float())
    if method.fits_values:
        solution, singular = fit_values(
            result.keys,
            result.bias,
            result.values,
            reference.queries,
            reference.output,
            scale=scale,
            weights=reference.weights,
            anchored=selection.anchored,
            chunk_bytes=chunk_bytes,
        )
        failures.add("singular", singular)
        fitted = solution.to(problem.values.dtype)
        if selection.anchored is not None:  # to the bit
            fitted = torch.where(selection.anchored.unsqueeze(2), result.values, fitted)
        result = replace(result, values=fitted)
        failures.add("non-finite", ~_finite(result.values))

    reached = attention_statistics(
        result.keys,
        result.values,
        reference.queries,
        scale=scale,
        key_bias=result.bias,
        norms=(),
        chunk_bytes=chunk_bytes,
    )
    original = AttentionStatistics(reference.lse, reference.output, {})
    errors = compare(original, reached, reference.weights)
    failures.add("non-finite", ~(errors.output_error + errors.mass_error).isfinite())
    return replace(result, output_error=errors.output_error, mass_error=errors.mass_error)


def _reference(method: Method, problem: Problem, kept: CompactedKV) -> ReferenceQueries:
    """What the fit of these keys reads, or what one is judged by that fits nothing."""
    statistics = problem.statistics
    if not method.fits:
        return evenly_drawn(problem.queries, statistics)
    scores = statistics.scores["rms"].gather(1, kept.indices.clamp(min=0))
    return sample_queries(
        kept.keys,
        kept.bias,
        scores,
        problem.queries,
        statistics,
        scale=problem.scale,
        chunk_bytes=problem.chunk_bytes,
    )


def _choose(methods: tuple[Method, ...], problem: Problem, budgets: Tensor, size: int) -> Tensor:
    """[H] int64, the method with the least error on queries that were left out of its fit."""
    heads, rows = problem.statistics.lse.shape
    held = _held_out(rows, problem.group_size).to(problem.keys.device)
    choice = budgets.new_zeros(heads)
    if not bool(held.any()) or bool(held.all()):
        return choice  # too few positions to hold any out
    # Scores for the selection are those of all queries: they are not what is judged.
    fitted, judged = (_rows(problem, part) for part in (~held, held))
    least = torch.full((heads,), torch.inf, device=problem.keys.device)
    for number, method in enumerate(methods):
        trial = _solve(method, fitted, budgets, size, Failures(heads, problem.keys.device))
        reached = attention_statistics(
            trial.keys,
            trial.values,
            judged.queries,
            scale=problem.scale,
            key_bias=trial.bias,
            norms=(),
            chunk_bytes=problem.chunk_bytes,
        )
        errors = compare(judged.statistics, reached)
        error = errors.output_error + MASS_ERROR_WEIGHT * errors.mass_error
        better = error < least  # never for NaN
        choice = torch.where(better, number, choice)
        least = torch.where(better, error, least)
    return choice


def _held_out(rows: int, group_size: int) -> Tensor:
    """[rows] bool: every ``HELDOUT_EVERY``-th run of positions, alike for all query heads."""
    position = torch.arange(rows) % max(1, rows // group_size)
    return position // HELDOUT_RUN % HELDOUT_EVERY == HELDOUT_EVERY - 1


def _rows(problem: Problem, rows: Tensor) -> Problem:
    """The problem as some of its queries see it; scores of all of them."""
    statistics = AttentionStatistics(
        problem.statistics.lse[:, rows],
        problem.statistics.output[:, rows],
        problem.statistics.scores,
    )
    return replace(problem, queries=problem.queries[:, rows], statistics=statistics)


def _finite(*tensors: Tensor) -> Tensor:
    """[H] bool, whether all numbers of a head are finite in all tensors [H, ...], none empty."""
    # By the extremes, which are NaN if any number is: no temporaries, a tenth of the time.
    flat = [tensor.reshape(len(tensor), -1) for tensor in tensors]
    extremes = [extreme for x in flat for extreme in (x.amax(dim=1), x.amin(dim=1))]
    if len({extreme.dtype for extreme in extremes}) > 1:
        extremes = [extreme.double() for extreme in extremes]
    return torch.stack(extremes).isfinite().all(dim=0)


def _mute(tensor: Tensor, ok: Tensor) -> Tensor:
    """Zeros in failed heads [H, ...]."""
    return tensor.masked_fill(~ok.view(-1, *[1] * (tensor.dim() - 1)), 0)
