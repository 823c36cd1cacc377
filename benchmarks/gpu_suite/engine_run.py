"""One engine, one workload, in a process of its own: a case as JSON in, a row as JSON out.

echo '{"model": {...}, "requests": 4, ...}' | python -m benchmarks.gpu_suite.engine_run
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fresh_process import environment, run_fresh


@dataclass(frozen=True)
class EngineCase:
    """What is served, and how.

    Attributes:
        model: config.json of the model; its weights are dummies.
        requests: how many, all at once, each of ``prompt_tokens`` random tokens (none shared).
        output_tokens: generated for each, whatever they are.
        kv_compaction: options of the plugin; None is stock vLLM.
        engine: further arguments of ``LLM``.
        warmups: requests of the first run, which is not measured; None for as many.
    """

    model: dict[str, Any]
    requests: int
    prompt_tokens: int
    output_tokens: int
    kv_compaction: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    warmups: int | None = None


@dataclass(frozen=True)
class EngineResult:
    """What came of it, in the second of two runs."""

    seconds: float
    output_tokens_per_second: float
    most_running: int
    """Sequences that were in the batch at once."""
    preemptions: int
    compactions: int
    failures: int
    pool_blocks: int
    compacted_tokens: int
    fit_seconds: float
    """Of the last thousand fits, in both runs."""


def run_engine(case: EngineCase, timeout: float = 580) -> EngineResult:
    """Run a case in a fresh process.

    Raises:
        RuntimeError: it failed; the message ends with its output.
    """
    defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    module = "benchmarks.gpu_suite.engine_run"
    return EngineResult(
        **run_fresh(module, asdict(case), environment(**(defaults | os.environ)), timeout)
    )


def _serve(case: EngineCase) -> EngineResult:
    import torch
    from vllm import SamplingParams

    from vllm_am import LLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.model))
        llm = LLM(
            folder,
            kv_compaction=case.kv_compaction,
            load_format="dummy",
            skip_tokenizer_init=True,
            seed=0,
            enable_prefix_caching=False,  # the second run must not hit the first one's blocks
            **case.engine,
        )
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    preemptions = 0
    preempt = scheduler._preempt_request

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal preemptions
        preemptions += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = count
    params = SamplingParams(
        max_tokens=case.output_tokens, temperature=0, ignore_eos=True, detokenize=False
    )
    seconds, most_running = 0.0, 0
    for turn in range(2):
        generator = torch.Generator().manual_seed(turn)
        requests = case.requests if turn or case.warmups is None else case.warmups
        size = (requests, case.prompt_tokens)
        prompts = torch.randint(5, case.model["vocab_size"], size, generator=generator).tolist()
        for index, prompt in enumerate(prompts):
            engine.add_request(f"{turn}-{index}", {"prompt_token_ids": prompt}, params)
        preemptions, most_running = 0, 0
        start = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
            most_running = max(most_running, len(scheduler.running))
        seconds = time.perf_counter() - start
    totals = scheduler.compaction.journal.totals if case.kv_compaction is not None else None
    return EngineResult(
        seconds=seconds,
        output_tokens_per_second=case.requests * case.output_tokens / seconds,
        most_running=most_running,
        preemptions=preemptions,
        compactions=totals.compactions if totals else 0,
        failures=sum(totals.failures.values()) if totals else 0,
        pool_blocks=scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        compacted_tokens=totals.tokens if totals else 0,
        fit_seconds=sum(totals.seconds) if totals else 0.0,
    )


if __name__ == "__main__":
    result = _serve(EngineCase(**json.load(sys.stdin)))
    print()
    print(json.dumps(asdict(result)))
