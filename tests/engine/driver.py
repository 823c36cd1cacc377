"""One engine, in this process, stepped by hand: what the engine tests are written with.

Also a program: ``python -m tests.engine.driver case.json`` runs one case in a fresh process (model
runner V2, tensor or pipeline parallel) and prints its result as JSON on the last line.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fresh_process import environment, run_fresh
from benchmarks.gpu_suite.compiled import compiled_from_now_on

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
#: Of these, what is for engines in this process only: a server must not inherit it.
OWN_VARIABLES = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")

BLOCK = 32
ROOT = Path(__file__).parents[2]


def environment_of_servers() -> dict[str, str]:
    """This process's environment, for one that starts ``vllm serve``."""
    return {key: value for key, value in os.environ.items() if key not in OWN_VARIABLES}


@dataclass(frozen=True)
class Ask:
    """A request to come."""

    prompt: tuple[int, ...]
    max_tokens: int = 16
    extra_args: dict[str, Any] | None = None
    arrives: int = 0
    """Engine step at which it is added."""
    aborted: int | None = None
    """Engine step at which it is aborted, if it still runs."""


@dataclass
class Engine:
    """A running engine and what it has produced."""

    llm: Any
    outputs: dict[str, list[int]] = field(default_factory=dict)
    cached_tokens: dict[str, int] = field(default_factory=dict)
    finish_reasons: dict[str, str] = field(default_factory=dict)
    logprobs: int | None = None
    """Keep the log-probabilities of so many tokens at every position, in ``likely``."""
    likely: dict[str, list[dict[int, float]]] = field(default_factory=dict)
    before_step: Callable[[Engine, int], None] | None = None
    """Called before every step with its number: observe, interfere."""

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def used_blocks(self) -> int:
        used: int = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
        return used

    @property
    def totals(self) -> Any:
        return self.scheduler.compaction.journal.totals

    @property
    def worker(self) -> Any:
        """The worker, if it is in this process; None under tensor or pipeline parallelism."""
        driver_worker = getattr(self.llm.llm_engine.model_executor, "driver_worker", None)
        return driver_worker and driver_worker.worker

    def run(self, asks: Sequence[Ask], check: bool = True, names: str = "") -> dict[str, list[int]]:
        """Serve ``asks`` to the end; tokens by index. Checks block ownership at every step."""
        from vllm import SamplingParams

        engine, step = self.llm.llm_engine, 0
        todo = sorted(enumerate(asks), key=lambda a: a[1].arrives)
        aborts = {f"{names}{i}": a.aborted for i, a in todo if a.aborted is not None}
        while todo or engine.has_unfinished_requests():
            while todo and todo[0][1].arrives <= step:
                index, ask = todo.pop(0)
                params = SamplingParams(
                    max_tokens=ask.max_tokens,
                    temperature=0,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=ask.extra_args,
                    logprobs=self.logprobs,
                )
                prompt = {"prompt_token_ids": list(ask.prompt)}
                engine.add_request(f"{names}{index}", prompt, params)
            for name in [n for n, at in aborts.items() if at <= step]:
                engine.abort_request([name])
                del aborts[name]
            if self.before_step is not None:
                self.before_step(self, step)
            for output in engine.step():
                if output.finished:
                    self.outputs[output.request_id] = list(output.outputs[0].token_ids)
                    self.cached_tokens[output.request_id] = output.num_cached_tokens
                    self.finish_reasons[output.request_id] = output.outputs[0].finish_reason
                    if self.logprobs is not None:
                        self.likely[output.request_id] = [
                            {token: entry.logprob for token, entry in position.items()}
                            for position in output.outputs[0].logprobs
                        ]
            if check and hasattr(self.scheduler, "check_compaction"):
                self.scheduler.check_compaction()
            step += 1
        for _ in range(3):  # let the workers hear of the last finished requests
            engine.step()
        return self.outputs


@contextmanager
def start(
    model: Path,
    kv_compaction: dict[str, Any] | None = None,
    force_async: bool = False,
    at_ratio_one: bool = True,
    pauses: bool = False,
    **options: Any,
) -> Iterator[Engine]:
    """Start an engine on the CPU; ``kv_compaction=None`` is stock vLLM.

    Args:
        force_async: run the async scheduler, which vLLM switches off on CPUs.
        pauses: put fits aside in the middle of a head when their time is up, by the clock.
        at_ratio_one: compact also where every key is kept, as nobody does that serves; what comes
            out must then be what comes out without compaction.
    """
    from vllm_am import LLM
    from vllm_am.engine import capabilities, limits
    from vllm_am.engine.scheduler import sequences

    settings: dict[str, Any] = {
        "max_model_len": 2048,
        "enforce_eager": True,
        "dtype": "float32",
        "block_size": BLOCK,
        "num_gpu_blocks_override": 513,
        "seed": 0,
    }
    if kv_compaction is not None:
        # A whole fit per step: by the clock, no two runs need do the same.
        kv_compaction = {"step_ms": 1e6, **kv_compaction}
    original, pausing = capabilities.check, limits.PAUSING_DEVICES
    if not pauses:
        limits.PAUSING_DEVICES = ()
    if force_async:

        def check(vllm_config: Any) -> None:
            original(vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        capabilities.check = check
    try:
        llm = LLM(str(model), kv_compaction=kv_compaction, **{**settings, **options})
    finally:
        capabilities.check, limits.PAUSING_DEVICES = original, pausing
    pointless = sequences.POINTLESS_RATIO
    if at_ratio_one:
        sequences.POINTLESS_RATIO = math.inf
    try:
        yield Engine(llm)
    finally:
        sequences.POINTLESS_RATIO = pointless
        llm.llm_engine.engine_core.shutdown()


def random_prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    """Token ids of the tiny model, special ones left out."""
    return tuple(rng.randrange(5, 500) for _ in range(length))


def mixed_asks(count: int, seed: int, longest: int = 500, max_tokens: int = 14) -> list[Ask]:
    """Prompts of all lengths, many sharing a prefix, arriving over time."""
    rng = random.Random(seed)
    prefixes = [random_prompt(rng, 400) for _ in range(2)]
    asks = []
    for index in range(count):
        shared = rng.choice(prefixes)[: rng.choice([0, 0, 100, 213, 400])]
        own = random_prompt(rng, rng.randrange(10, max(11, longest - len(shared))))
        asks.append(Ask(shared + own, rng.randrange(2, max_tokens), arrives=index // 4))
    return asks


def run_case(case: dict[str, Any], timeout: float = 540) -> dict[str, Any]:
    """Run one case in a fresh process; see ``main`` for its keys."""
    variables = environment(**case.get("environment", {}))
    result: dict[str, Any] = run_fresh("tests.engine.driver", case, variables, timeout)
    return result


def main() -> None:
    """Read a case from standard input: model, kv_compaction, options, asks, v2, force_async,
    cuda_backend, logprobs."""
    case = json.load(sys.stdin)
    if case.get("v2"):
        from tests.engine import v2_on_cpu  # noqa: F401  (before vLLM is imported)
    if case.get("cuda_backend"):
        from tests.engine import cuda_on_cpu  # noqa: F401  (before vLLM is started)
    asks = [Ask(**{**a, "prompt": tuple(a["prompt"])}) for a in case["asks"]]
    from vllm.compilation.counter import compilation_counter

    with start(
        Path(case["model"]),
        case.get("kv_compaction"),
        force_async=case.get("force_async", False),
        **case.get("options", {}),
    ) as engine:
        engine.logprobs = case.get("logprobs")
        compiled = compiled_from_now_on()
        outputs = engine.run(asks)
        result: dict[str, Any] = {
            "outputs": outputs,
            "likely": engine.likely,
            "used_blocks": engine.used_blocks,
            "scheduler": type(engine.scheduler).__name__,
            "compiled": compiled,
            "graphs": compilation_counter.num_cudagraph_captured,
        }
        if (worker := engine.worker) is not None:
            context = worker.vllm_config.compilation_config.static_forward_context
            backends = {x.attn_backend for x in context.values() if hasattr(x, "attn_backend")}
            result["runner"] = type(worker.model_runner).__module__
            if getattr(worker, "_compaction", None) is not None:
                weights = worker._compaction.fitting.head_weights
                result["head_weights"] = None if weights is None else weights.tolist()
            result["backends"] = sorted(backend.__name__ for backend in backends)
        if hasattr(engine.scheduler, "compaction"):
            result["compactions"] = engine.totals.compactions
            result["failures"] = engine.totals.failures
            result["reference_tokens"] = engine.totals.reference_tokens
            result["reference_shortfalls"] = engine.totals.reference_shortfalls
            result["blocks_freed"] = engine.totals.blocks_freed
            result["merges"] = engine.totals.merges
            result["shared"] = engine.totals.cache_hits + engine.totals.cache_adoptions
    print(json.dumps(result))


if __name__ == "__main__":
    main()
