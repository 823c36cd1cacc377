"""What it costs to read a part of the reference queries in a fit, and what it saves.

    python -m benchmarks.quality samples

Answers of the recall models after compaction by the default method (tensors, one document each, as
``recall`` has them), where a fit reads all queries, samples of several sizes (see
``vllm_am.compaction.sample_queries``), or as many that are chosen by position alone. The sample of
the defaults was chosen on the bundled model; the validation model had no say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from unittest.mock import patch

import torch
import typer

from benchmarks.folders import Folder, Record, result_path, written
from benchmarks.gpu_suite.report import Report, Row
from benchmarks.quality.conversations import Mode
from benchmarks.quality.recall import TensorRunner, parse_ratios
from benchmarks.quality.results import Setting
from vllm_am.compaction import fitting, sample_queries
from vllm_am.compaction.sample_queries import ReferenceQueries
from vllm_am.compaction.statistics import AttentionStatistics

#: Queries that are read at least, and for each slot.
SIZES = {
    "all": (1 << 30, 0),
    "2,048, 4 per slot": (2048, 4),
    "2,048, 8 per slot": (2048, 8),
    "1,024, 4 per slot": (1024, 4),
    "512, 2 per slot": (512, 2),
}
BY_POSITION = "2,048, 4 per slot, by position"
MODELS = ("bundled", "validation")


@contextmanager
def sampling(name: str) -> Iterator[None]:
    """Fits read samples of one kind."""
    fewest, per_slot = SIZES.get(name, SIZES["2,048, 4 per slot"])
    with (
        patch.object(sample_queries, "FEWEST_QUERIES", fewest),
        patch.object(sample_queries, "QUERIES_PER_SLOT", per_slot),
        patch.object(
            fitting,
            "sample_queries",
            _by_position if name == BY_POSITION else sample_queries.sample_queries,
        ),
    ):
        yield


def _by_position(
    keys: torch.Tensor,
    bias: torch.Tensor,
    scores: torch.Tensor,
    queries: torch.Tensor,
    statistics: AttentionStatistics,
    **_: object,
) -> ReferenceQueries:
    """Every so many-th, whatever it asks for."""
    total = queries.shape[1]
    count = sample_queries.sample_size(total, keys.shape[1])
    rows = torch.arange(count) * total // count
    return ReferenceQueries(queries[:, rows], statistics.lse[:, rows], statistics.output[:, rows])


def measure(
    models: list[str], ratios: list[float], documents: int, density: str, asked: str, tokens: int
) -> Iterator[Row]:
    """A row per model, ratio and kind of sample."""
    for model in models:
        setting = Setting(
            backend="tensor",
            density=density,
            mode=Mode.AFTER,
            tokens=tokens,
            documents=documents,
            questions=asked,
            block_size=16,
            model=model,
        )
        runner = TensorRunner(setting)
        for name in (*SIZES, BY_POSITION):
            with sampling(name):
                for ratio, found in runner.measure({}, ratios):
                    counts = found.grade.counts
                    right = {kind: 100 * counts[kind].share for kind in counts}
                    yield {
                        "model": model,
                        "queries read": name,
                        "ratio": f"{1 / ratio:g}x",
                        **{f"{kind}, %": share for kind, share in right.items()},
                        "nll": found.grade.nll,
                        "output error": found.output_error,
                        "mass error": found.mass_error,
                        "s": found.seconds,
                    }


def main(
    models: Annotated[str, typer.Option(help="Of the recall models.")] = ",".join(MODELS),
    ratios: Annotated[str, typer.Option(help="Compaction ratios; 5x keeps 0.2.")] = "10x,20x,50x",
    documents: Annotated[int, typer.Option(min=1)] = 8,
    density: Annotated[str, typer.Option(help="sparse or dense.")] = "dense",
    asked: Annotated[str, typer.Option(help="Questions of each kind, per document.")] = "14/6/3",
    tokens: Annotated[int, typer.Option(min=300, help="Of a document, about.")] = 2000,
    out: Folder = None,
    record: Record = False,
) -> None:
    """Fits that read all reference queries, against fits that read a sample."""
    folder = result_path(out, record)
    notes = [
        f"{documents} {density} documents of about {tokens:,} tokens, some 3,900 reference queries "
        "of each KV head; right answers in %; errors on held-out queries; CPU seconds per "
        "compaction, statistics included.",
    ]
    rows = measure(models.split(","), parse_ratios(ratios), documents, density, asked, tokens)
    Report("quality-sample", "Fits from a sample of the queries", rows, notes).write(folder)
    typer.echo((folder / "quality-sample.md").read_text())
    typer.echo(written(folder, "quality-sample.md", "quality-sample.csv"))
