"""What the flag costs on a CPU where nothing is compacted: reading prompts, and writing answers.

    python -m benchmarks.nothing_compacted

No sequence reaches the threshold, and the pool holds them all. Each case is one run of stock vLLM
and one of ours on the same requests (random tokens, dummy weights), twice, in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.engine_run import EngineCase
from benchmarks.gpu_suite.models import TINY, qwen3
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.memory_bound import CPU, compare

#: Shapes: one whose steps take milliseconds, so that all that is done beside them shows, and that
#: of SmolLM2-135M (its vocabulary cut down: its product is none of ours).
MODELS: dict[str, dict[str, Any]] = {
    "tiny": CPU.model,
    "SmolLM2-135M's": qwen3(
        layers=30,
        hidden=576,
        intermediate=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocabulary=8192,
        positions=8192,
        dtype="float32",
    ),
}

#: Requests, tokens of their prompts and of their answers.
CASES = {
    "tiny": ((12, 2000, 1), (12, 2000, 600)),
    "SmolLM2-135M's": ((4, 2000, 1), (4, 2000, 200)),
}
TURNS = 2


def rows_of(smoke: bool) -> Iterator[Row]:
    """Per case and turn: stock vLLM, then ours."""
    for name, model in ({"tiny": TINY} if smoke else MODELS).items():
        for requests, prompt, output in ((2, 40, 4),) if smoke else CASES[name]:
            case = EngineCase(
                model=model,
                requests=requests,
                prompt_tokens=prompt,
                output_tokens=output,
                warmups=1,
                engine={
                    "max_model_len": 4096 if not smoke else 1024,
                    "max_num_seqs": requests,
                    "block_size": 32,
                    "num_gpu_blocks_override": 2048 if not smoke else 128,
                    **CPU.engine,
                },
            )
            for _ in range(1 if smoke else TURNS):
                threshold = {"threshold": 900 if smoke else 4000}
                yield from compare(case, threshold, model=name)


def main(
    out: Folder = None,
    record: Record = False,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, to try the code.")] = False,
) -> None:
    """Measure, write ``nothing_compacted.{csv,md}``."""
    folder = result_path(out, record)
    notes = ["Answers of one token: the time is that of reading the prompts."]
    title = "The flag is on, nothing is compacted"
    Report("nothing_compacted", title, rows_of(smoke), notes).write(folder)
    typer.echo((folder / "nothing_compacted.md").read_text())
    typer.echo(written(folder, "nothing_compacted.md", "nothing_compacted.csv"))


if __name__ == "__main__":
    typer.run(main)
