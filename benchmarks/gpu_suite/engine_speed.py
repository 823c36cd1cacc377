"""What the flag costs when nothing is compacted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_suite.engine_run import EngineCase
from benchmarks.gpu_suite.models import QWEN3_4B, TINY
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.memory_bound import SMOKE, compare


def overhead(smoke: bool) -> Report:
    """The flag is on, no sequence reaches the threshold."""
    sizes = [(64, 512, 256)] if not smoke else [(2, 40, 4)]
    engine: dict[str, Any] = {"gpu_memory_utilization": 0.9} if not smoke else SMOKE.engine

    def rows() -> Iterator[Row]:
        for requests, prompt, output in sizes:
            case = EngineCase(
                model=TINY if smoke else QWEN3_4B,
                requests=requests,
                prompt_tokens=prompt,
                output_tokens=output,
                engine={"max_model_len": 1024, "max_num_seqs": requests, **engine},
            )
            yield from compare(case, {"threshold": 1000})

    note = "Target: at least 0.98x of stock vLLM's tokens per second."
    return Report("overhead", "The flag is on and nothing is compacted", rows(), [note])
