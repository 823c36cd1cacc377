"""What a compaction costs beside the prompt that it compacts: seconds of one CPU thread.

    python -m benchmarks.fit_cost

Real weights and a real text where there are any (``make real-models``), in the real engine, default
options, float32. "Read" is the step of stock vLLM that reads the prompt; "fit" is all of a
compaction, from the reference queries to the pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.fresh_process import environment, run_fresh
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.real_models.catalogue import find_model, find_text
from benchmarks.real_models.packages import Unavailable
from benchmarks.recall.documents import make_document
from benchmarks.recall.recipe import BUNDLED
from vllm_am.config import CompactionConfigError, parse_ratio

#: Models and tokens of their prompts.
CASES = "bundled:2000,smollm2-135m:2048,smollm2-135m:6000"
TEXT = "news"
#: Of the machine that measures; one thread is one core.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def prompt_of(model: str, tokens: int) -> tuple[Path, list[int]]:
    """A model's folder, and a text of so many tokens.

    Raises:
        Unavailable: the packages that it comes from cannot be had.
    """
    from transformers import AutoTokenizer

    if model == "bundled":
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED.model)
        ids: list[int] = []
        for seed in range(1 + tokens // 500):
            ids += tokenizer.encode(make_document(seed, 1000).text, add_special_tokens=False)
        return BUNDLED.model, ids[:tokens]
    folder = find_model(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return folder, tokenizer.encode(find_text(TEXT)[: 12 * tokens])[:tokens]


def measured(model: Path, prompt: list[int], ratio: float | None) -> dict[str, float]:
    """Seconds by what was done; stock vLLM where the ratio is None."""
    job = {"model": str(model), "tokens": prompt, "ratio": ratio}
    module, variables = "benchmarks.fit_cost_engine", environment(**ONE_THREAD)
    found: dict[str, float] = run_fresh(module, job, variables, timeout=1800)
    return found


def rows_of(cases: Sequence[tuple[str, int]], ratios: Sequence[float]) -> Iterator[Row]:
    """Per case: stock vLLM, then a row for each ratio."""
    for model, tokens in cases:
        folder, prompt = prompt_of(model, tokens)
        read = measured(folder, prompt, None)["read"]
        for ratio in ratios:
            found = measured(folder, prompt, ratio)
            yield {
                "model": model,
                "prompt tokens": len(prompt),
                "ratio": f"{1 / ratio:g}x",
                "read, s": read,
                "fit, s": found["fit"],
                "fit, all queries, s": found["fit, all queries"],
                "fit / read": found["fit"] / read,
                "all queries / read": found["fit, all queries"] / read,
            }


def main(
    ratios: Annotated[str, typer.Option(help="Compaction ratios.")] = "2x,5x,10x,20x,50x",
    cases: Annotated[str, typer.Option(help="Models and tokens of their prompts.")] = CASES,
    out: Folder = None,
    record: Record = False,
) -> None:
    """Measure, write ``fit_cost.{csv,md}``."""
    folder = result_path(out, record)
    try:
        kept = [parse_ratio(part, "--ratios") for part in ratios.split(",")]
    except CompactionConfigError as error:
        raise typer.BadParameter(str(error)) from None
    parsed = [case.partition(":") for case in cases.split(",")]
    if wrong := [":".join(case) for case in parsed if not case[2].isdigit()]:
        raise typer.BadParameter(f"--cases: {wrong[0]!r}: expected MODEL:TOKENS")
    notes = [
        "One thread, float32, the better of two runs after a first. `all queries`: where a fit "
        "reads all reference queries instead of a sample (`vllm_am.compaction.sample_queries`).",
    ]
    rows = rows_of([(name, int(tokens)) for name, _, tokens in parsed], kept)
    try:
        Report("fit_cost", "Fits beside the prompts", rows, notes).write(folder)
    except Unavailable as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo((folder / "fit_cost.md").read_text())
    typer.echo(written(folder, "fit_cost.md", "fit_cost.csv"))


if __name__ == "__main__":
    typer.run(main)
