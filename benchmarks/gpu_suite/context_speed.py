"""A long context in an engine, alone: its prefill, its compaction, and decoding behind it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.fresh_process import environment, run_fresh
from benchmarks.gpu_suite.models import QWEN3_4B, TINY
from benchmarks.gpu_suite.report import Report, Row

#: Tokens of the context, and tokens that are decoded behind it.
FULL = {"model": QWEN3_4B, "tokens": 32_768, "decoded": 192, "ratio": 0.05, "repeats": 2}
SMOKE = {"model": TINY, "tokens": 700, "decoded": 24, "ratio": 0.25, "repeats": 1}


def report(smoke: bool) -> Report:
    """The suite's stage ``context``."""
    case: dict[str, Any] = dict(SMOKE if smoke else FULL)
    engine: dict[str, Any] = {"enforce_eager": True, "dtype": "float32"} if smoke else {}
    case["engine"] = {"gpu_memory_utilization": 0.2 if smoke else 0.8, **engine}

    def rows() -> Iterator[Row]:
        defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
        variables = environment(**(defaults | os.environ))
        yield from run_fresh("benchmarks.gpu_suite.context_speed", case, variables, timeout=500)

    notes = [
        f"{case['tokens']:,} random tokens, dummy weights; {case['ratio']:g} of the compacted part "
        "is kept. The same engine, the request with compaction and without, in turn; medians.",
        "`decode ms`: median of a step in the last half of the answer, when the compaction is "
        "done. `compaction s`: what the compacted request takes longer until there. Target: at "
        "most a quarter of the prefill. `compiled meanwhile`: kernels of ours that the warm-up at "
        "startup left to the first request.",
    ]
    return Report("context", "A long context alone in an engine", rows(), notes)


def _serve(case: dict[str, Any]) -> list[Row]:
    """Time from the request to each token, with compaction and without."""
    import torch
    from vllm import SamplingParams

    from benchmarks.gpu_suite.compiled import compiled_from_now_on
    from vllm_am import LLM

    tokens, decoded = case["tokens"], case["decoded"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case["model"]))
        llm = LLM(
            folder,
            kv_compaction={"ratio": case["ratio"], "threshold": tokens // 2},
            load_format="dummy",
            skip_tokenizer_init=True,
            seed=0,
            max_model_len=tokens + decoded + 64,
            max_num_seqs=8,
            enable_prefix_caching=False,
            **case["engine"],
        )
    engine = llm.llm_engine

    def arrivals(name: str, options: dict[str, Any]) -> list[float]:
        """Seconds from the request to each of its tokens."""
        generator = torch.Generator().manual_seed(hash(name) % 1000)
        vocabulary = case["model"]["vocab_size"]
        prompt = torch.randint(5, vocabulary, (tokens,), generator=generator).tolist()
        params = SamplingParams(
            max_tokens=decoded,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=options,
        )
        times: list[float] = []
        start = time.perf_counter()
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                got = len(output.outputs[0].token_ids)
                times += [time.perf_counter() - start] * (got - len(times))
        return times

    compiled = compiled_from_now_on()
    found: dict[str, list[list[float]]] = {"exact": [], "compacted": []}
    for turn in range(case["repeats"] + 1):
        for kind, options in (("exact", {"kv_compaction": "off"}), ("compacted", {})):
            times = arrivals(f"{kind}-{turn}", dict(options))
            if turn:
                found[kind].append(times)
    totals = engine.engine_core.engine_core.scheduler.compaction.journal.totals
    half = decoded // 2
    rows: list[Row] = []
    prefill = median(times[0] for times in found["exact"])
    steps = {
        kind: median(b - a for times in runs for a, b in pairwise(times[half:]))
        for kind, runs in found.items()
    }
    for kind, runs in found.items():
        middle = median(times[half] for times in runs)
        row: Row = {
            "request": kind,
            "tokens": tokens,
            "first token s": median(times[0] for times in runs),
            "longest step s": median(max(b - a for a, b in pairwise(times)) for times in runs),
            "decode ms": 1e3 * steps[kind],
        }
        if kind == "compacted":
            cost = middle - median(times[half] for times in found["exact"])
            row |= {
                "compaction s": cost,
                "share of prefill": cost / prefill,
                "compactions": totals.compactions,
                "compiled meanwhile": len(compiled),
                "failures": sum(totals.failures.values()),
            }
        rows.append(row)
    return rows


if __name__ == "__main__":
    result = _serve(json.load(sys.stdin))
    print()
    print(json.dumps(result))
