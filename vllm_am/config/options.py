"""Every option of an engine with compaction, its default, its bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vllm_am.compaction import METHODS
from vllm_am.config.budgets import BY_SCORES, parse_budgets
from vllm_am.config.errors import CompactionConfigError, shown
from vllm_am.config.queries import (
    PASS_SOURCES,
    STARTERS,
    parse_queries,
    parse_reference_prompts,
)
from vllm_am.config.ratio_threshold import (
    DEFAULT_THRESHOLD_TOKENS,
    Threshold,
    parse_ratio,
    parse_threshold,
)

#: Values of ``cache``.
CACHE_MODES = ("auto", "on", "off")

#: By device, most milliseconds of a step's fits where ``step_ms`` is not given: then they take as
#: long as the model's own steps do, so that a stream of tokens goes on at half its pace at worst.
DEFAULT_STEP_MS = {"cuda": 20.0, "cpu": 50.0}

#: Of ``step_ms``, while somebody waits for blocks: who waits would gain nothing by short steps.
PRESSED = 10

#: Options that are about the passes of certain query sources.
_OF_SOURCES = {
    "instruction": ("repeat-prefill",),
    "starters": ("self-study",),
    "self_study_tokens": ("self-study",),
    "prompts_tokens": ("prompts",),
    "pass_tokens": PASS_SOURCES,
}


def _is_number(value: Any) -> bool:
    """Not a bool, which Python takes for one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class CompactionConfig:
    """Options of KV compaction.

    The text below each field is what `--help=kv-compaction-config` and the documentation's page of
    options show (:mod:`vllm_am.config.option_help`): markdown, for users.
    """

    ratio: float = 0.1
    """Fraction of the compacted KV that is **kept**, in (0, 1]; `"50x"` is the same as 0.02 (some
    libraries count the fraction removed). 1 leaves everything as it is."""
    threshold: int | str | None = None
    """Uncompacted tokens that a sequence may hold; or a share of the KV pool such as `"80%"`:
    sequences are compacted, longest first, when more of the pool is in use, *instead of* being
    preempted, or when a prompt waits as the pool could not hold it to its end. null: 4096, or half
    of `--max-model-len` if that is less."""
    method: str = "highest-attention"
    """How keys are chosen and fitted: `highest-attention`, `omp`, `omp-fast` (the paper's),
    `peaks-and-coverage`, `peaks-and-coverage-auto`, `eliminate` (ours); `evict-mean`, `evict-max`,
    `snapkv`, `recent`, `random` only evict, to compare with."""
    budgets: str | dict[str, float] = "auto"
    """How the pages of a compacted span are divided among all heads: `uniform`; `global`, by how
    many of the best keys of the sequence a head holds; `auto`, the same, but keys of heads that
    look up and copy count for more (found at startup, in one short pass over random tokens; the log
    names them); or a JSON file of shares `{"L0H0": 0.01, ...}` of every head, as the paper's
    authors publish them and `vllm-am budgets` measures them."""
    reference_queries: int = 8192
    """At most this many reference query vectors per KV head and sequence (a GQA group pooled)."""
    queries: str | dict[str, float] = "context-rotated"
    """Where reference queries come from: `context-rotated` (the prompt's own, rotated to positions
    behind it, free), `context-prefill` (the same as they were captured), `repeat-prefill` (the text
    is repeated), `self-study` (the model writes about it), `prompts` (your typical questions),
    `random`; or a mixture such as `{"prompts": 0.5, "context-rotated": 0.5}`."""
    instruction: str = "Repeat the previous context verbatim."
    """What stands between the context and its repetition (`repeat-prefill`)."""
    starters: tuple[str, ...] = STARTERS
    """What the model is asked to write about the context (`self-study`): main points, key facts,
    JSON, questions with answers."""
    self_study_tokens: int = 256
    """Most tokens that the model writes for each starter (`self-study`)."""
    prompts_file: str | None = None
    """Text file of what users typically ask, one per line (`prompts`)."""
    prompts_tokens: int = 32
    """Most tokens that the model answers to each line of the file (`prompts`)."""
    pass_tokens: int = 2048
    """Most tokens that one reference pass reads; longer texts are repeated in several passes."""
    on_policy: bool = False
    """Each layer is compacted in the middle of a forward pass of the reference texts, from queries
    that come through the layers compacted before it: one more pass instead of one for each layer,
    and the whole fit in one engine step. Needs a query source with passes."""
    reference_prompts: dict[str, list[list[int]]] | None = None
    """Token ids of what the passes read, by source, instead of the texts above; null: encoded at
    startup."""
    query_pool_share: float = 1 / 32
    """Token positions whose queries can be held at once, as a share of the KV pool's, at least one
    sequence's (two, where that is no more than an eighth). A sequence that there is no room for
    when it is read stays exact. Costs `share x group / 2` of the KV memory."""
    heldout_share: float = 1 / 32
    """Share of the reference queries that is kept out of the fit, to measure its error on. Small: a
    key that only one of these asks for is lost."""
    max_error: float | None = None
    """Bound of a compaction's held-out output error (mean over heads): a fit above it is thrown
    away and tried with twice the slots, and the sequence stays exact if nothing would be saved.
    null: no bound."""
    recent_tokens: int = 64
    """The most recent tokens of a sequence, which stay exact."""
    protected_tokens: int = 4
    """The first tokens of a sequence (attention sinks), which stay exact; whole blocks."""
    min_span_tokens: int = 256
    """Shortest span worth compacting when the threshold is a share of the pool."""
    max_span_tokens: int = 16384
    """Longest span fitted as one problem; longer ones become several segments."""
    merge_slots: int | None = None
    """Once the compacted part of a sequence has more slots per head (on average) than this, its
    segments are merged into one of as many: bounds the memory of endless sequences, at the price of
    compacting old text again (queries of the compacted tokens stay in the query pool for it).
    null: never."""
    cache: str = "auto"
    """Whether compacted prefixes are kept for requests that begin with the same text: `on`, `off`,
    or `auto`: where vLLM caches exact prefixes, and there is no `merge_slots`. Their fits read no
    query from behind the span."""
    preload: tuple[str, ...] = ()
    """Files of compacted prefixes (`vllm-am compact`), which are loaded at startup and kept."""
    load_any_options: bool = False
    """Load prefixes that were compacted with other options than the server's (never of another
    model)."""
    prefix_folder: str | None = None
    """Where prefixes are saved to and loaded from over HTTP; null: they are not."""
    pinned_share: float = 0.5
    """Of the KV pool, what named prefixes may hold at most."""
    step_ms: float | None = None
    """Most milliseconds that fits may add to one engine step; longer fits are spread over steps.
    null: as many as the model's own steps take, and 20 at most, on a CPU 50."""
    pressed_step_ms: float | None = None
    """The same while somebody waits for KV blocks. null: ten times `step_ms`, or 200, on a CPU
    500."""

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> CompactionConfig:
        """Validate and normalise user options.

        Raises:
            CompactionConfigError: unknown option, wrong type, or a value out of range.
        """
        if not isinstance(options, Mapping):
            raise CompactionConfigError(
                f"--kv-compaction-config: expected an object of options such as "
                f'{{"ratio": 0.1}}, got {shown(options)}'
            )
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise CompactionConfigError(
                f"--kv-compaction-config: unknown option {unknown[0]!r}; "
                f"the options are {', '.join(sorted(known))}"
            )
        values: dict[str, Any] = dict(options)
        if "ratio" in values:
            values["ratio"] = parse_ratio(values["ratio"])
        if values.get("threshold") is not None:
            tokens = parse_threshold(values["threshold"]).tokens
            values["threshold"] = str(values["threshold"]).strip() if tokens is None else tokens
        if "budgets" in values:
            values["budgets"] = parse_budgets(values["budgets"])
        if "queries" in values:
            values["queries"] = parse_queries(values["queries"])
        if values.get("reference_prompts") is not None:
            values["reference_prompts"] = parse_reference_prompts(values["reference_prompts"])
        for name in ("starters", "preload"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        config = cls(**values)
        config._validate()
        return config

    def _validate(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise CompactionConfigError(
                f"--kv-compaction-config method={shown(self.method)}: the methods are "
                f"{', '.join(sorted(METHODS))}"
            )
        if not isinstance(self.cache, str) or self.cache not in CACHE_MODES:
            raise CompactionConfigError(
                f"--kv-compaction-cache={shown(self.cache)}: expected one of "
                f"{', '.join(CACHE_MODES)}"
            )
        whole = {
            "reference_queries": 1,
            "self_study_tokens": 1,
            "prompts_tokens": 1,
            "pass_tokens": 64,
            "recent_tokens": 1,
            "protected_tokens": 0,
            "min_span_tokens": 1,
            "max_span_tokens": 1,
        }
        if self.merge_slots is not None:
            whole["merge_slots"] = 1
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CompactionConfigError(
                    f"--kv-compaction-config {name}={shown(value)}: expected a whole number "
                    f">= {least}"
                )
        shares = {"query_pool_share": 1.0, "heldout_share": 0.5, "pinned_share": 1.0}
        for name, high in shares.items():
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= high:
                raise CompactionConfigError(
                    f"--kv-compaction-config {name}={shown(value)}: expected a number in "
                    f"[0, {high:g}]"
                )
        self._validate_step_times()
        bound = self.max_error
        if bound is not None and not (_is_number(bound) and 0 < bound < math.inf):
            raise CompactionConfigError(
                f"--kv-compaction-config max_error={shown(bound)}: expected a relative error > 0 "
                "such as 0.3, or null for no bound"
            )
        if self.min_span_tokens > self.max_span_tokens:
            raise CompactionConfigError(
                f"--kv-compaction-config min_span_tokens={self.min_span_tokens}: must not exceed "
                f"max_span_tokens={self.max_span_tokens}"
            )
        self._validate_prefixes()
        self._validate_queries()

    def _validate_prefixes(self) -> None:
        """What is saved and loaded."""
        paths = self.preload
        if not isinstance(paths, tuple) or not all(isinstance(p, str) and p for p in paths):
            raise CompactionConfigError(
                f"--kv-compaction-preload={shown(paths)}: expected files of compacted prefixes"
            )
        if paths and self.cache == "off":
            raise CompactionConfigError(
                "--kv-compaction-preload: has no effect with --kv-compaction-cache off; drop one"
            )
        if not isinstance(self.load_any_options, bool):
            raise CompactionConfigError(
                f"--kv-compaction-config load_any_options={shown(self.load_any_options)}: expected "
                "true or false"
            )
        folder = self.prefix_folder
        if folder is not None and not (isinstance(folder, str) and folder):
            raise CompactionConfigError(
                f"--kv-compaction-config prefix_folder={shown(folder)}: expected a folder"
            )

    def _validate_step_times(self) -> None:
        """How long fits may take in a step."""
        for name in ("step_ms", "pressed_step_ms"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise CompactionConfigError(
                    f"--kv-compaction-config {name}={shown(value)}: expected milliseconds > 0, or "
                    "null for the default"
                )
        pressed = self.pressed_step_ms
        if self.step_ms is not None and pressed is not None and pressed < self.step_ms:
            raise CompactionConfigError(
                f"--kv-compaction-config pressed_step_ms={shown(pressed)}: must not be less than "
                f"step_ms={shown(self.step_ms)}"
            )

    def _validate_queries(self) -> None:
        """The texts of the query sources, and that each is of use."""
        if not isinstance(self.instruction, str) or not self.instruction.strip():
            raise CompactionConfigError(
                f"--kv-compaction-config instruction={shown(self.instruction)}: expected some text"
            )
        starters = self.starters
        if (
            not isinstance(starters, tuple)
            or not starters
            or not all(isinstance(text, str) and text.strip() for text in starters)
        ):
            raise CompactionConfigError(
                f"--kv-compaction-config starters={shown(starters)}: expected a list of texts"
            )
        if self.prompts_file is not None and (
            not isinstance(self.prompts_file, str) or not self.prompts_file
        ):
            raise CompactionConfigError(
                f"--kv-compaction-config prompts_file={shown(self.prompts_file)}: expected the "
                "path of a text file with one typical question per line"
            )
        asked, given = self.query_fractions, self.reference_prompts or {}
        for name, sources in _OF_SOURCES.items():
            default = next(f.default for f in fields(self) if f.name == name)
            if getattr(self, name) != default and not set(sources) & set(asked):
                raise CompactionConfigError(
                    f"--kv-compaction-config {name}={shown(getattr(self, name))}: has no effect "
                    f"without {' or '.join(sources)} among the queries, which are "
                    f"{shown(self.queries)}; drop it, or add that"
                )
        if "prompts" in asked and self.prompts_file is None and "prompts" not in given:
            raise CompactionConfigError(
                f"--kv-compaction-config queries={shown(self.queries)}: prompts needs "
                "prompts_file, a text file with one typical question per line"
            )
        if self.prompts_file is not None and "prompts" not in asked:
            raise CompactionConfigError(
                f"--kv-compaction-config prompts_file={shown(self.prompts_file)}: has no effect "
                'without queries "prompts" (or a mixture with it); add that'
            )
        if not isinstance(self.on_policy, bool):
            raise CompactionConfigError(
                f"--kv-compaction-config on_policy={shown(self.on_policy)}: expected true or false"
            )
        if self.on_policy and not self.pass_fraction:
            raise CompactionConfigError(
                f"--kv-compaction-config on_policy={shown(self.on_policy)}: has no effect without "
                f"a query source that reads texts ({', '.join(PASS_SOURCES)}); queries is "
                f"{shown(self.queries)}"
            )
        if unused := sorted(set(given) - set(asked)):
            raise CompactionConfigError(
                f"--kv-compaction-config reference_prompts={shown(self.reference_prompts)}: "
                f"{unused[0]} has no effect, queries is {shown(self.queries)}"
            )

    @property
    def query_fractions(self) -> dict[str, float]:
        """The sources of reference queries with their fractions, which sum to 1."""
        return {self.queries: 1.0} if isinstance(self.queries, str) else self.queries

    @property
    def rotates_context(self) -> bool:
        """Whether the context's own queries are rotated behind it: unless named as captured."""
        return "context-prefill" not in self.query_fractions

    def step_seconds(self, device_type: str) -> tuple[float, float]:
        """What compaction may add to one engine step, and while somebody waits for blocks."""
        default = DEFAULT_STEP_MS.get(device_type, DEFAULT_STEP_MS["cuda"])
        usual = self.step_ms
        if usual is None:
            usual = min(default, self.pressed_step_ms or default)
        pressed = self.pressed_step_ms or PRESSED * usual
        return usual / 1000, pressed / 1000

    @property
    def measures_scores(self) -> bool:
        """Whether the heads' scores are compared before their pages are divided."""
        return isinstance(self.budgets, str) and self.budgets in BY_SCORES

    @property
    def pass_fraction(self) -> float:
        """The share of the reference queries that comes from passes."""
        return sum(f for source, f in self.query_fractions.items() if source in PASS_SOURCES)

    def check_heads(self, layers: Sequence[int], kv_heads: int) -> None:
        """The heads of a budgets file are the model's, all of them.

        Args:
            layers: indices of those that are compacted.

        Raises:
            CompactionConfigError: naming the first head that the model or the file does not have.
        """
        if isinstance(self.budgets, str):
            return
        every = [f"L{layer}H{head}" for layer in layers for head in range(kv_heads)]
        if unknown := sorted(self.budgets.keys() - set(every)):
            raise CompactionConfigError(
                f"--kv-compaction-config budgets: {unknown[0]} is not compacted in this model, of "
                f"{len(layers)} such layers x {kv_heads} KV heads; use a budgets file made for it"
            )
        if missing := [key for key in every if key not in self.budgets]:
            raise CompactionConfigError(
                f"--kv-compaction-config budgets: {missing[0]} and {len(missing) - 1} more of the "
                f"model's {len(every)} heads have no share; give every head one, 0 to keep nothing"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, accepted by :meth:`from_dict`; what travels to every vLLM process."""
        return asdict(self)

    def resolve_threshold(self, max_model_len: int, block_size: int) -> Threshold:
        """The threshold for this model.

        Raises:
            CompactionConfigError: a threshold at which no sequence could ever be compacted, or
                below what stays exact anyway.
        """
        if self.threshold is None:
            return Threshold(tokens=min(DEFAULT_THRESHOLD_TOKENS, max(1, max_model_len // 2)))
        threshold = parse_threshold(self.threshold)
        if threshold.tokens is not None:
            if threshold.tokens >= max_model_len:
                raise CompactionConfigError(
                    f"--kv-compaction-threshold={threshold.tokens}: not below --max-model-len "
                    f"({max_model_len}), so no sequence would ever be compacted; lower it"
                )
            self.check_threshold(threshold.tokens, block_size)
        return threshold

    def check_threshold(
        self, tokens: int, block_size: int, name: str = "--kv-compaction-threshold"
    ) -> None:
        """Raises :class:`CompactionConfigError` for a threshold below what stays exact anyway."""
        exact = self.recent_tokens + self.protected_tokens + 2 * block_size
        if tokens < exact:
            raise CompactionConfigError(
                f"{name}={tokens}: below the {exact} tokens that stay exact (recent_tokens + "
                f"protected_tokens + two blocks of {block_size}); raise it, or lower recent_tokens "
                "in --kv-compaction-config"
            )
