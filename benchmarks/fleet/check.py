"""The simulation against the real engine, on a CPU.

What a step costs is fitted where memory is ample; what comes of tight pools is predicted from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.fleet.costs import Costs, Work, shape_of
from benchmarks.fleet.simulate import EngineShape, Outcome, Simulation
from benchmarks.fleet.traces import Request
from benchmarks.gpu_suite.engine_run import EngineCase, EngineResult, run_engine
from benchmarks.gpu_suite.report import Row
from benchmarks.memory_bound import CPU, Workload
from vllm_am.config.options import DEFAULT_STEP_MS
from vllm_am.plan import make_plan

#: What is predicted.
LOAD = replace(CPU, requests=10, prompt_tokens=1500, output_tokens=500)
#: Requests at once, tokens of their prompts and answers: what costs are fitted to.
SHAPES = (
    (1, 400, 150),
    (10, 300, 150),
    (10, 1500, 20),
    (3, 1500, 400),
    (10, 1500, 200),
)
AMPLE, TIGHT = 12, (2, 4)
BATCHED_TOKENS = 2048


@dataclass(frozen=True)
class Setting:
    """One run, of the engine and on paper.

    Attributes:
        pool: whole contexts that fit.
        compacts: with the plugin, at a threshold of the workload's tokens.
    """

    load: Workload
    pool: int
    compacts: bool

    def measured(self) -> EngineResult:
        """By the real engine, in a fresh process."""
        load = self.load
        return run_engine(
            EngineCase(
                model=load.model,
                requests=load.requests,
                prompt_tokens=load.prompt_tokens,
                output_tokens=load.output_tokens,
                kv_compaction=self.options if self.compacts else None,
                warmups=load.warmups,
                engine={
                    "max_model_len": self.context,
                    "max_num_seqs": load.requests,
                    "max_num_batched_tokens": BATCHED_TOKENS,
                    "block_size": load.block_size,
                    "num_gpu_blocks_override": self.blocks + 1,
                    **load.engine,
                },
            )
        )

    def simulated(self, costs: Costs) -> Outcome:
        """On paper."""
        load = self.load
        plan = make_plan(
            shape_of(load.model),
            0,
            context=self.context,
            itemsize=4,
            block_size=load.block_size,
            options=self.options,
            in_flight_tokens=BATCHED_TOKENS,
        )
        engine = EngineShape(
            blocks=self.blocks,
            block_size=load.block_size,
            max_num_seqs=load.requests,
            max_num_batched_tokens=BATCHED_TOKENS,
            compaction=plan.limits if self.compacts else None,
        )
        request = Request(0.0, load.prompt_tokens, load.output_tokens)
        return Simulation(engine, costs).run([request] * load.requests)

    @property
    def options(self) -> dict[str, Any]:
        """Of the plugin."""
        return {"ratio": self.load.ratio, "threshold": self.load.thresholds[0]}

    @property
    def context(self) -> int:
        """Longest, as the pool's size counts it."""
        return LOAD.prompt_tokens + LOAD.output_tokens + 64

    @property
    def blocks(self) -> int:
        """Of the pool."""
        return self.pool * -(-self.context // self.load.block_size)


def fitted(compacts: bool) -> Costs:
    """Costs of an engine, from runs in ample memory."""
    limit = DEFAULT_STEP_MS["cpu"] / 1e3
    costs = Costs(1e-3, 1e-5, 0, 1e-4, 1e-8, 1e-8, 1e-5, limit)
    settings = [
        Setting(
            replace(LOAD, requests=requests, prompt_tokens=prompt, output_tokens=output),
            AMPLE,
            compacts,
        )
        for requests, prompt, output in SHAPES
    ]
    results = [setting.measured() for setting in settings]
    spans = sum(result.compacted_tokens for result in results)
    if spans:
        costs = replace(costs, fit_tokens=sum(r.fit_seconds for r in results) / spans)
    # What is done depends on what it costs, where fits are spread over steps: twice is enough.
    for _ in range(3):
        outcomes = [setting.simulated(costs) for setting in settings]
        rows = np.array([astuple(outcome.work) for outcome in outcomes])
        seconds = np.array(
            [r.seconds - o.fit_seconds for r, o in zip(results, outcomes, strict=True)]
        )
        scale = np.array([r.seconds for r in results])[:, None]
        # In units that make the columns alike, and relative to each run's time.
        units = rows.max(axis=0)
        units[units == 0] = 1
        found, _ = nnls(rows / units / scale, (seconds[:, None] / scale)[:, 0])
        costs = replace(costs, **dict(zip(Work.__dataclass_fields__, found / units, strict=True)))
    return costs


def checked() -> Iterator[Row]:
    """Tokens per second as measured and as predicted, of tight pools."""
    for compacts in (False, True):
        costs = fitted(compacts)
        for pool in TIGHT:
            setting = Setting(LOAD, pool, compacts)
            result, outcome = setting.measured(), setting.simulated(costs)
            yield {
                "pool, contexts": pool,
                "engine": "compaction" if compacts else "stock",
                "tokens/s, measured": result.output_tokens_per_second,
                "tokens/s, simulated": outcome.tokens_per_second,
                "simulated / measured": outcome.tokens_per_second / result.output_tokens_per_second,
                "at once, measured": result.most_running,
                "at once, simulated": outcome.most_running,
                "preemptions, measured": result.preemptions,
                "preemptions, simulated": outcome.preemptions,
                "ms per step": 1e3 * costs.steps,
                "µs per prompt token": 1e6 * costs.prompt_tokens,
                "µs per token of an answer": 1e6 * costs.sequences,
                "ns per held token": 1e9 * costs.held_tokens,
                "ns per slot": 1e9 * costs.slots,
                "µs per compacted token": 1e6 * costs.fit_tokens if compacts else "",
            }
