"""The registry of benchmark cases: what is measured, at which sizes, by which script.

Scripts take their sizes from here, so that two of them cannot mean different things by one name.
"""

from __future__ import annotations

from dataclasses import dataclass

VS_REFERENCE = "benchmarks.vs_reference"
GPU_SUITE = "benchmarks.gpu_suite"
PAGE_OVERHEAD = "benchmarks.page_overhead"
ROUNDS = "benchmarks.quality.rounds"


@dataclass(frozen=True)
class Case:
    """A compaction job: ``layers * kv_heads`` heads, each a sequence of ``segments`` fits.

    Attributes:
        name: as on the command line and in tables.
        script: module that runs it.
        measures: what its table shows.
        layers: number of layers that are compacted; kv_heads: KV heads of each.
        group_size: query heads per KV head.
        head_dim: of keys, values and queries.
        tokens: of the whole sequence, T of one fit being ``tokens_per_fit``.
        segments: equal parts that are fitted one by one.
        queries: reference queries per KV head and fit, those of a group pooled.
        ratios: shares of the keys that are kept.
        source: where the shape or the numbers to compare with come from.
    """

    name: str
    script: str
    measures: tuple[str, ...]
    layers: int
    kv_heads: int
    group_size: int
    head_dim: int
    tokens: int
    segments: int
    queries: int
    ratios: tuple[float, ...]
    source: str

    @property
    def heads(self) -> int:
        return self.layers * self.kv_heads

    @property
    def tokens_per_fit(self) -> int:
        return -(-self.tokens // self.segments)


_RECONSTRUCTION = ("seconds per head", "held-out output error", "held-out mass error")
_RATIOS = (0.2, 0.1, 0.05, 0.02)

CASES = (
    Case(
        name="synthetic",
        script=VS_REFERENCE,
        measures=_RECONSTRUCTION,
        layers=1,
        kv_heads=3,
        group_size=1,
        head_dim=128,
        tokens=4096,
        segments=1,
        queries=3000,
        ratios=_RATIOS,
        source="synthetic heads; 205 slots at 20x is the CPU target",
    ),
    Case(
        name="synthetic-small",
        script=VS_REFERENCE,
        measures=_RECONSTRUCTION,
        layers=1,
        kv_heads=2,
        group_size=1,
        head_dim=128,
        tokens=1024,
        segments=1,
        queries=3000,
        ratios=_RATIOS,
        source="synthetic heads, at the size of the quality tests",
    ),
    Case(
        name="recall",
        script=VS_REFERENCE,
        measures=_RECONSTRUCTION,
        layers=4,
        kv_heads=2,
        group_size=2,
        head_dim=64,
        tokens=2000,
        segments=1,
        queries=3000,
        ratios=_RATIOS,
        source="KV and queries of the bundled recall model on a held-out document",
    ),
    Case(
        name="recall-rounds",
        script=ROUNDS,
        measures=("right answers",),
        layers=4,
        kv_heads=2,
        group_size=2,
        head_dim=64,
        tokens=2000,
        segments=30,
        queries=8192,
        ratios=(0.1, 0.05),
        source="held-out documents, compacted in rounds as they grow and at once",
    ),
    Case(
        name="gemma-3-12b",
        script=GPU_SUITE,
        measures=("seconds", "peak memory", "share of the matmul ceiling"),
        layers=8,
        kv_heads=8,
        group_size=2,
        head_dim=256,
        tokens=60_000,
        segments=5,
        queries=16_384,
        ratios=(0.05,),
        source="global layers of Gemma-3-12B; the paper: 3 + 2.2 + 1.8 s on one H200",
    ),
    Case(
        name="qwen3-4b",
        script=GPU_SUITE,
        measures=("seconds", "peak memory", "share of the context's prefill time"),
        layers=36,
        kv_heads=8,
        group_size=4,
        head_dim=128,
        tokens=32_768,
        segments=2,
        queries=8192,
        ratios=(0.05,),
        source="Qwen3-4B; 16,384 tokens are the engine's longest span",
    ),
    *(
        Case(
            name=f"pages-{tokens // 1024}k",
            script=PAGE_OVERHEAD,
            measures=("blocks held", "real ratio", "blocks held if padded"),
            layers=8,
            kv_heads=4,
            group_size=1,
            head_dim=32,
            tokens=tokens,
            segments=1,
            queries=256,
            ratios=(0.1, 0.02),
            source="the smallest model on which heads can differ as they do in published budgets",
        )
        for tokens in (4096, 8192, 16_384)
    ),
)


def find_case(name: str) -> Case:
    """The case of that name.

    Raises:
        KeyError: there is none; the message lists those there are.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise KeyError(f"no benchmark case {name!r}, known are {', '.join(c.name for c in CASES)}")


def cases_of(script: str) -> tuple[Case, ...]:
    """The cases that a script runs, in order."""
    return tuple(case for case in CASES if case.script == script)
