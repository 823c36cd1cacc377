"""The box solver, by the number of thread blocks that work on a head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_suite.fit_speed import make_heads
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.gpu_suite.timing import Work, paired
from vllm_am.compaction.fit_bias import LOG_WEIGHT_BOUNDS, mass_normal_equations
from vllm_am.compaction.select_keys import gather_keys, top_keys
from vllm_am.compaction.statistics import attention_statistics
from vllm_am.kernels import solve_box as solver

#: Heads and slots of each: a slice with uniform budgets, and large heads of uneven ones.
FULL = ((24, 205), (24, 820), (8, 820), (8, 1640), (2, 1640), (1, 3276), (1, 4096))
SMOKE = ((2, 20), (1, 40))
TEAMS = (1, 2, 4, 8, 16, 32, 64)
#: Of the problems: tokens, queries, head size.
TOKENS, QUERIES, DIM = 8192, 8192, 128


def _problem(heads: int, slots: int, smoke: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal equations of a mass fit."""
    made = make_heads(heads, *((60, 100, 16) if smoke else (TOKENS, QUERIES, DIM)))
    scale = made.keys.shape[2] ** -0.5
    statistics = attention_statistics(made.keys, made.values, made.queries, scale=scale)
    budgets = torch.full((heads,), slots, device=made.keys.device)
    kept = gather_keys(made.keys, top_keys(statistics.scores["rms"], budgets, slots))
    bias = torch.zeros(heads, slots, device=kept.device)
    return mass_normal_equations(kept, bias, made.queries, statistics.lse, scale=scale)


def _solve(gram: torch.Tensor, rhs: torch.Tensor, blocks: int | None) -> solver.BoxSolution:
    lo, hi = (math.exp(bound) for bound in LOG_WEIGHT_BOUNDS)
    plan_launch = solver.plan_launch

    def plan(batch: int, size: int, properties: Any, team_blocks: int | None = None) -> solver.Plan:
        return plan_launch(batch, size, properties, team_blocks or blocks)

    with mock.patch.object(solver, "plan_launch", plan):
        return solver.solve_box(gram, rhs, lo, hi)


def _rows(smoke: bool) -> Iterator[Row]:
    for heads, slots in SMOKE if smoke else FULL:
        gram, rhs = _problem(heads, slots, smoke)
        teams: tuple[int | None, ...] = (*TEAMS, None)
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(gram.device)
            most = properties.multi_processor_count // heads
            teams = (*(n for n in TEAMS if n <= most), None)
            chosen = solver.plan_launch(heads, slots, properties).team_blocks
        else:
            chosen = 1
        works: dict[str, Work] = {str(n): partial(_solve, gram, rhs, n) for n in teams}
        times = paired(works, repeats=5, warmups=1)
        alone = _solve(gram, rhs, 1)
        for blocks in teams:
            found = _solve(gram, rhs, blocks)
            yield {
                "heads": heads,
                "slots": slots,
                "blocks of a head": chosen if blocks is None else blocks,
                "chosen": "yes" if blocks is None else "",
                "ms": 1e3 * times[str(blocks)],
                "of one block": times[str(blocks)] / times["1"],
                "same result": str(torch.equal(found.x, alone.x)),
                "residual": float(found.kkt_residual.max()),
            }


def report(smoke: bool) -> Report:
    """The suite's stage ``solver``."""
    notes = [
        "Normal equations of a mass fit on 8,192 queries. `chosen`: what the launcher takes.",
    ]
    return Report("solver", "The box solver", _rows(smoke), notes)
