"""What the scheduler tells the workers about compaction each step, and what they report back.

Plain picklable dataclasses: they ride on vLLM's ``SchedulerOutput`` (attribute
:data:`STEP_ATTRIBUTE`) and ``ModelRunnerOutput`` (:data:`REPORTS_ATTRIBUTE`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

STEP_ATTRIBUTE = "kv_compaction"
REPORTS_ATTRIBUTE = "kv_compaction_reports"

OUT_OF_MEMORY, INTERNAL_ERROR = "out-of-memory", "internal-error"
#: The fit succeeded, but its held-out error is above the ``max_error`` of the configuration.
TOO_LOSSY = "max-error"
#: Why a fit can fail: the reasons of :class:`vllm_am.compaction.FitError`, and two of our own.
FAILURES = (
    "non-finite",
    "no-queries",
    "singular",
    "no-mass",
    OUT_OF_MEMORY,
    INTERNAL_ERROR,
    TOO_LOSSY,
)


@dataclass(frozen=True)
class Segment:
    """A compacted span: tokens [start, end) of one sequence.

    Its blocks hold ``slots`` slots per head on average; the workers divide the pages of these
    blocks among the heads.
    """

    start: int
    end: int
    slots: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class RandomQueries:
    """Gaussian reference queries that each worker draws for itself."""

    positions: int
    """Vectors per query head."""
    like: np.ndarray
    """int64 [n]: slots of the query pool with sampled queries, whose size the vectors have."""


@dataclass(frozen=True)
class OnPolicy:
    """The fit happens inside this step's forward pass: layer by layer, just before each attends.

    The passes see, in every layer, what the fit has just made of the span in place of the span.
    """

    pass_ids: tuple[str, ...]
    """The reference passes of this step; all of their tokens are computed in it."""
    measured_slots: np.ndarray
    """int64 [n]: slots of the queries that the pages are divided by (global budgets): those there
    are before the forward pass."""
    measured_shifts: np.ndarray
    """int64 [n]: see :class:`FitSlice`."""


@dataclass(frozen=True)
class HeadRange:
    """KV heads ``begin`` to ``end`` of ``of``, counted layer by layer.

    A pipeline stage may have more or fewer layers than others: it takes its part of its own.
    """

    begin: int
    end: int
    of: int

    def among(self, heads: int) -> range:
        """Those of so many heads that it stands for."""
        return range(heads * self.begin // self.of, heads * self.end // self.of)


@dataclass(frozen=True)
class FitSlice:
    """One step's share of a compaction: measure some heads, or fit them into the target's blocks.

    Where the pages are divided by what all heads need (``CompactionConfig.measures_scores``), all
    of them are measured before the first is fitted.

    A merge is a compaction whose source is not tokens but all segments of the sequence, which the
    workers know as the pages of each head.

    The source blocks are only read and the target blocks belong to nobody else, so the sequence
    goes on decoding on its exact KV until the scheduler has seen the report and commits.
    """

    job_id: int
    request_id: str
    segment: Segment
    """The target: its ``block_ids`` are freshly allocated blocks."""
    source_block_ids: tuple[int, ...]
    query_slots: np.ndarray
    """int64 [n]: slots of the query pool that hold the reference queries of this sequence."""
    query_shifts: np.ndarray
    """int64 [n]: by how many positions each of them is rotated onwards."""
    method: str
    heads: HeadRange
    measures: bool = False
    """The heads are measured; else they are fitted."""
    work: float = 0.0
    """What the scheduler expects of it (``vllm_am.compaction.work``), to learn from the time."""
    random_queries: RandomQueries | None = None
    on_policy: OnPolicy | None = None
    """None: fitted before the forward pass, from queries that are there already."""
    merges: bool = False


@dataclass(frozen=True)
class Activation:
    """From this step on the sequence attends to the segment instead of its tokens' blocks."""

    request_id: str
    job_id: int
    """The fit that wrote the segment: the workers know which page went to which head."""
    segment: Segment
    replaces: bool = False
    """The segment was merged from all earlier ones, and takes their place."""


@dataclass(frozen=True)
class Publication:
    """A segment outlives its request: the workers keep its page lists until it is dropped."""

    segment_id: int
    """Of the fit that wrote it."""
    segment: Segment


@dataclass(frozen=True)
class Attachment:
    """From this step on the sequence attends to these published segments, behind those it has."""

    request_id: str
    segment_ids: tuple[int, ...]


@dataclass(frozen=True)
class SavedPart:
    """Each rank writes its heads of one part of a compacted prefix to a file of its own."""

    transfer: str
    name: str
    """Of the part: see ``prefix_file.py``."""
    path: str
    """Of the file that it is a part of."""
    segment_id: int | None
    """Published; None: the protected tokens, which are exact."""
    block_ids: tuple[int, ...]
    """Of the protected tokens."""


@dataclass(frozen=True)
class LoadedPart:
    """Each rank reads its heads of one part of a saved prefix into blocks that nobody else has."""

    transfer: str
    name: str
    path: str
    segment_id: int | None
    """What it is published as, unless a rank fails; None: the protected tokens."""
    segment: Segment


@dataclass(frozen=True)
class SharedPrefix:
    """A reference pass starts behind a partly compacted sequence, whose segments it shares."""

    request_id: str
    parent_id: str


@dataclass(frozen=True)
class QuerySample:
    """Queries of this step that go into the pool: token offsets within the request's new tokens."""

    offsets: np.ndarray
    """int64 [n]: offset from the request's first token scheduled in this step."""
    slots: np.ndarray
    """int64 [n]: destination slots in the query pool."""


@dataclass
class CompactionStep:
    """Everything the workers need to know for one engine step; empty for most steps."""

    published: list[Publication] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    attached: list[Attachment] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    """Fits that nobody waits for any more, by job."""
    dropped: list[int] = field(default_factory=list)
    """Published segments that nobody can attach to any more."""
    shared: list[SharedPrefix] = field(default_factory=list)
    saved: list[SavedPart] = field(default_factory=list)
    loaded: list[LoadedPart] = field(default_factory=list)
    fits: list[FitSlice] = field(default_factory=list)
    fit_seconds: float = 0.0
    """Time that this step has for fits, of this step and of earlier ones, where a worker can put
    one aside (``EngineLimits.pauses_fits``); 0 where none is under way."""
    samples: dict[str, QuerySample] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass(frozen=True)
class SliceReport:
    """How long a slice took: on the output rank, whose heads are like those of the others."""

    job_id: int
    measures: bool
    heads: HeadRange
    work: float
    """What had been expected of it; 0 where it failed."""
    seconds: float
    slots: tuple[int, ...] | None = None
    """Where the pages were divided in it: slots of each head of that rank."""


@dataclass(frozen=True)
class FitTime:
    """What fits have added to one step."""

    seconds: float


@dataclass(frozen=True)
class FitReport:
    """The outcome of a whole compaction (all its slices), the same on every rank."""

    job_id: int
    failure: str | None
    """None, or why the fit was rejected (a label of the failure metric)."""
    output_error: float
    """Mean relative error of the attention output on held-out queries, over layers and heads."""
    mass_error: float
    """Mean relative error of the attention mass on held-out queries."""
    seconds: float
    """Time the worker spent fitting."""


@dataclass(frozen=True)
class PartReport:
    """A part of a prefix was saved or loaded, on every rank."""

    transfer: str
    name: str
    failure: str | None
    """None, or why some rank failed."""


#: What the workers report.
Report = FitReport | SliceReport | FitTime | PartReport
