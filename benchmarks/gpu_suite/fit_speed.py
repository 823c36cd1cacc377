"""How long a compaction takes, from statistics to values, at the shapes of real models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import GPU_SUITE, Case, cases_of
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.gpu_suite.timing import Work, device, matmul_ceiling, paired
from benchmarks.uneven_budgets import uneven_budgets
from vllm_am.compaction import compact
from vllm_am.compaction.statistics import attention_statistics

#: The paper's time for the same work on the same GPU: selection, bias and values (appendix).
PAPER_SECONDS = {"gemma-3-12b": 3.0 + 2.2 + 1.8}


@dataclass(frozen=True)
class Heads:
    """Some heads of one segment: keys and values [H, T, D], queries [H, N, D]."""

    keys: Tensor
    values: Tensor
    queries: Tensor


def make_heads(heads: int, tokens: int, queries: int, dim: int) -> Heads:
    """Heads with topics, as sharp as real ones: white noise would make every fit trivial.

    Keys cluster around topic directions in runs of tokens; a query looks for a mixture of topics.
    """
    generator = torch.Generator(device()).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device(), dtype=torch.bfloat16)

    topics = 32
    centers = torch.nn.functional.normalize(normal(heads, topics, dim).float(), dim=2).bfloat16()
    topic = torch.arange(tokens, device=device()) * topics // max(tokens, 1)
    keys = dim**0.5 * (0.75 * centers[:, topic] + 0.6 * normal(heads, tokens, dim) / dim**0.5)
    mixture = torch.softmax(3.0 * normal(heads, queries, topics).float(), dim=2).bfloat16()
    sought = 1.5 * torch.bmm(mixture, centers) + 0.5 * normal(heads, queries, dim) / dim**0.5
    return Heads(keys, normal(heads, tokens, dim), dim**0.5 * sought)


def slice_heads(case: Case, ratio: float) -> int:
    """Heads that the engine fits as one batch: the layers of one slice of this case."""
    # Here: the engine's room imports vLLM.
    from vllm_am.config import CompactionConfig
    from vllm_am.engine.limits import EngineLimits

    config = CompactionConfig(ratio=ratio)
    limits = EngineLimits(
        config=config,
        threshold=config.resolve_threshold(case.tokens, block_size=16),
        block_size=16,
        max_model_len=case.tokens,
        num_layers=case.layers,
        kv_heads=case.kv_heads,
        queries_per_kv=case.group_size,
        head_size=case.head_dim,
        in_flight_tokens=case.tokens,
    )
    at_once = limits.heads_at_once(case.tokens_per_fit, round(ratio * case.tokens_per_fit))
    return min(at_once, case.heads)


def fit_case(case: Case, method: str, repeats: int, uneven: bool) -> Iterator[Row]:
    """A row per ratio: the seconds of all heads and segments of the case.

    Args:
        uneven: budgets as heads of a real model get them, instead of all alike.
    """
    from vllm_am.engine.worker.state import FIT_TEMPORARIES, fit_bytes

    tokens, scale = case.tokens_per_fit, case.head_dim**-0.5
    chunk_bytes = fit_bytes(device()) // FIT_TEMPORARIES
    for ratio in case.ratios:
        batch = slice_heads(case, ratio)
        heads = make_heads(batch, tokens, case.queries, case.head_dim)
        keywords: dict[str, Any] = {"scale": scale, "chunk_bytes": chunk_bytes}
        slots = uneven_budgets(batch, tokens, ratio) if uneven else round(ratio * tokens)
        tensors = (heads.keys, heads.values, heads.queries)
        works: dict[str, Work] = {
            "statistics": partial(attention_statistics, *tensors, **keywords),
            "all": partial(compact, *tensors, budget=slots, method=method, **keywords),
        }
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        times = paired(works, repeats=repeats, warmups=1)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        batches = case.segments * case.heads / batch
        # Products of the statistics: scores twice (mass and outputs, then the keys' own), outputs.
        flops = 6 * batch * case.queries * tokens * case.head_dim
        yield {
            "case": case.name,
            "method": method,
            "budgets": "uneven" if uneven else "uniform",
            "ratio": ratio,
            "heads": case.heads,
            "heads at once": batch,
            "segments": case.segments,
            "tokens per fit": tokens,
            "queries": case.queries,
            "seconds, statistics": times["statistics"] * batches,
            "seconds, all": times["all"] * batches,
            "statistics TFLOP/s": flops / times["statistics"] / 1e12,
            "peak GiB": peak,
        }


def report(smoke: bool) -> Report:
    """The suite's stage ``fit``."""
    cases = cases_of(GPU_SUITE)
    if smoke:
        cases = tuple(
            replace(c, layers=1, kv_heads=2, head_dim=32, tokens=600, segments=2, queries=300)
            for c in cases
        )
    ceiling = matmul_ceiling(256 if smoke else 8192)

    def rows() -> Iterator[Row]:
        for case, uneven in product(cases, (False, True)):
            for row in fit_case(case, "highest-attention", 1 if smoke else 3, uneven):
                rate = float(str(row["statistics TFLOP/s"]))
                row["share of the matmul ceiling"] = rate * 1e12 / ceiling
                row["paper's seconds"] = PAPER_SECONDS.get(case.name, "")
                yield row

    notes = [
        f"Measured bf16 matmul ceiling: {ceiling / 1e12:.3g} TFLOP/s.",
        "One batch, as large as the engine's slices are, is timed and multiplied. What the host "
        "takes to launch is in it.",
        "Uneven budgets: as the default gives them to the heads of SmolLM2-135M at 20x "
        "(`benchmarks/uneven_budgets.py`).",
        "Targets: Gemma-3-12B shape at most 0.30 s; statistics at least 60 % of the ceiling for "
        "head size 256, 55 % for 128.",
    ]
    return Report("fit", "Time of a compaction", rows(), notes)
