"""The one configuration object of KV compaction: every option, its default, its bounds.

Filled from the command line (:mod:`vllm_am.engine.flags`) or from
``LLM(additional_config={"kv_compaction": {...}})``, validated once, then passed around as a whole.
Imports no vLLM.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_am.compaction import METHODS

#: Key of the options inside vLLM's ``additional_config``.
CONFIG_KEY = "kv_compaction"

#: Threshold (tokens) when the user names none: below about 4k tokens the KV cache of one sequence
#: is small beside the weights, so there is little to win; ``resolve_threshold`` lowers it to half
#: of ``max_model_len`` for short-context models, so that the flag is never a silent no-op.
DEFAULT_THRESHOLD_TOKENS = 4096


class CompactionConfigError(ValueError):
    """An invalid option. The message names the flag and says how to mend it."""


def parse_ratio(value: Any, name: str = "--kv-compaction-ratio") -> float:
    """The fraction of the compacted KV that is kept: ``0.02``, ``"0.02"`` and ``"50x"`` are one.

    Raises:
        CompactionConfigError: not a number, or outside (0, 1].
    """
    text = str(value).strip().lower()
    try:
        ratio = 1.0 / float(text[:-1]) if text.endswith("x") else float(text)
    except (ValueError, ZeroDivisionError):
        ratio = math.nan
    if isinstance(value, bool) or not 0.0 < ratio <= 1.0:
        raise CompactionConfigError(
            f"{name}={value!r}: expected the fraction of the KV cache that is KEPT, a number in "
            f"(0, 1] such as 0.1, or a factor such as 10x (which keeps a tenth)"
        )
    return ratio


@dataclass(frozen=True)
class Threshold:
    """When a sequence is compacted: exactly one of the two is set."""

    tokens: int | None = None
    """Uncompacted tokens that a sequence may hold."""
    pool_share: float | None = None
    """Share of the KV pool that may be in use before sequences are compacted, in (0, 1)."""

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        return f"{100 * (self.pool_share or 0):g}% of the KV pool"


def parse_threshold(
    value: Any, name: str = "--kv-compaction-threshold", allow_share: bool = True
) -> Threshold:
    """``4096`` (tokens per sequence) or ``"80%"`` (share of the KV pool in use).

    Raises:
        CompactionConfigError: neither form, or out of range.
    """
    text = str(value).strip()
    if allow_share and text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = math.nan
        if 0.0 < share < 1.0:
            return Threshold(pool_share=share)
    elif not isinstance(value, bool):
        try:
            tokens = int(text)
        except ValueError:
            tokens = 0
        if tokens > 0:
            return Threshold(tokens=tokens)
    share_hint = " or a share of the KV pool such as 80%" if allow_share else ""
    raise CompactionConfigError(
        f"{name}={value!r}: expected a positive number of tokens such as 4096{share_hint}"
    )


#: How the pages of a compacted span are divided among the heads, where no file says it.
BUDGETS = ("uniform", "global")


def parse_budgets(value: Any, name: str = "--kv-compaction-config budgets") -> Any:
    """One of :data:`BUDGETS`, or the shares of a budgets file ``{"L{layer}H{head}": share}``.

    Args:
        value: a name, the path of a JSON file, or its content.

    Raises:
        CompactionConfigError: not one of these, or a share that is not a number >= 0.
    """
    if isinstance(value, str) and value in BUDGETS:
        return value
    shares: Any = value
    if isinstance(value, str):
        try:
            shares = json.loads(Path(value).read_text())
        except (OSError, ValueError) as error:
            raise CompactionConfigError(
                f"{name}={value!r}: expected {', '.join(BUDGETS)} or the path of a JSON file "
                f"({error})"
            ) from None
    if not isinstance(shares, Mapping) or not shares:
        raise CompactionConfigError(
            f'{name}={value!r}: expected an object of shares such as {{"L0H0": 0.01, ...}}'
        )
    for key, share in shares.items():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not re.fullmatch(r"L\d+H\d+", str(key)) or not number or not 0 <= share < math.inf:
            raise CompactionConfigError(
                f"{name}={value!r}: {key!r}: {share!r}, expected L<layer>H<KV head>: share >= 0"
            )
    if not any(shares.values()):
        raise CompactionConfigError(f"{name}={value!r}: all shares are zero")
    return dict(shares)


#: Sources of reference queries that need passes through the model behind the context.
PASS_SOURCES = ("repeat-prefill", "self-study", "prompts")
#: Where reference queries can come from.
QUERY_SOURCES = ("context-rotated", "context-prefill", *PASS_SOURCES, "random")

#: What the model is asked to do, to see what it looks for (the fixed specs of the paper's code).
STARTERS = (
    "Summarize the main points of the text above.",
    "Collect all key facts that the text above states, one per line.",
    "Restructure the text above as JSON, with every date, time, name and number in it.",
    "Write three different questions that test whether somebody has read the text above "
    "closely, and answer each of them.",
)


def parse_queries(
    value: Any, name: str = "--kv-compaction-config queries"
) -> str | dict[str, float]:
    """One of :data:`QUERY_SOURCES`, or a mixture ``{source: fraction}``, normalised to sum 1.

    Raises:
        CompactionConfigError: an unknown source, or fractions that are no positive numbers.
    """
    shares = {value: 1.0} if isinstance(value, str) else value
    good = isinstance(shares, Mapping) and all(
        source in QUERY_SOURCES
        and isinstance(share, int | float)
        and not isinstance(share, bool)
        and 0 < share < math.inf
        for source, share in shares.items()
    )
    if not good or not shares:
        raise CompactionConfigError(
            f"{name}={value!r}: expected one of {', '.join(QUERY_SOURCES)}, or an object of "
            f'positive fractions of them such as {{"self-study": 0.5, "context-rotated": 0.5}}'
        )
    if {"context-rotated", "context-prefill"} <= set(shares):
        raise CompactionConfigError(
            f"{name}={value!r}: context-rotated and context-prefill are the same queries, "
            "choose one of them"
        )
    total = sum(shares.values())
    return value if isinstance(value, str) else {s: share / total for s, share in shares.items()}


def parse_reference_prompts(
    value: Any, name: str = "--kv-compaction-config reference_prompts"
) -> dict[str, list[list[int]]]:
    """Token ids ``{source: [[id, ...], ...]}`` of what the reference passes of a source read.

    Raises:
        CompactionConfigError: anything else.
    """
    good = isinstance(value, Mapping) and all(
        source in PASS_SOURCES
        and isinstance(texts, list | tuple)
        and texts
        and all(isinstance(ids, list | tuple) and ids for ids in texts)
        and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for t in texts for i in t)
        for source, texts in value.items()
    )
    if not good:
        raise CompactionConfigError(
            f"{name}={value!r}: expected lists of token ids by source ({', '.join(PASS_SOURCES)}), "
            'such as {"prompts": [[5, 17, 3], [8]]}'
        )
    return {source: [list(ids) for ids in texts] for source, texts in value.items()}


@dataclass(frozen=True)
class CompactionConfig:
    """Options of KV compaction. Units and defaults are documented in the README's table."""

    ratio: float = 0.1
    """Fraction of the keys of a compacted span that is kept, per KV head; in (0, 1]."""
    threshold: int | str | None = None
    """Tokens per sequence, or ``"80%"`` of the KV pool; None: :data:`DEFAULT_THRESHOLD_TOKENS`."""
    method: str = "highest-attention"
    """How keys are chosen and fitted: a name in :data:`vllm_am.compaction.METHODS`."""
    budgets: str | dict[str, float] = "global"
    """How the pages of a span are divided among all heads: ``"uniform"``, ``"global"`` (by their
    share of the highest attention scores of the sequence), or shares by head."""
    reference_queries: int = 8192
    """At most this many reference query vectors per KV head and sequence (a GQA group pooled)."""
    queries: str | dict[str, float] = "context-rotated"
    """Where reference queries come from: one of :data:`QUERY_SOURCES`, or fractions of them."""
    instruction: str = "Repeat the previous context verbatim."
    """What ``repeat-prefill`` puts between the context and its repetition."""
    starters: tuple[str, ...] = STARTERS
    """What ``self-study`` asks the model to write about the context."""
    self_study_tokens: int = 256
    """Most tokens that the model writes for each starter."""
    prompts_file: str | None = None
    """Text file of the questions of ``prompts``: what users typically ask, one per line."""
    prompts_tokens: int = 32
    """Most tokens that the model answers to each of the ``prompts``."""
    pass_tokens: int = 2048
    """Most tokens that one reference pass reads; longer texts are repeated in several passes."""
    on_policy: bool = False
    """Each layer is compacted in the middle of a forward pass of the reference texts, from the
    queries that arrive there through the layers compacted before it."""
    reference_prompts: dict[str, list[list[int]]] | None = None
    """Token ids of what passes read, by source; None: encoded at startup from the texts above."""
    query_pool_share: float = 1 / 32
    """Token positions whose queries the engine can hold at once, as a share of the KV pool's."""
    heldout_share: float = 1 / 8
    """Share of the reference queries that is kept out of the fit, to measure its error on."""
    max_error: float | None = None
    """Highest held-out output error of a compaction, mean over heads; a fit above it is thrown away
    and tried with twice the slots, until nothing would be saved. None: no bound."""
    recent_tokens: int = 64
    """The most recent tokens of a sequence, which stay exact."""
    protected_tokens: int = 4
    """The first tokens of a sequence, which stay exact (attention sinks); whole blocks."""
    min_span_tokens: int = 256
    """Shortest span worth compacting when the threshold is a share of the pool."""
    max_span_tokens: int = 16384
    """Longest span fitted as one problem; longer ones become several segments."""
    merge_slots: int | None = None
    """Once the compacted part of a sequence has more slots per head (on average) than this, its
    segments are merged into one of as many, in whole blocks. None: never."""
    layer_tokens_per_step: int = 65536
    """Work bound of one engine step, in tokens x layers; longer fits are spread over steps."""

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> CompactionConfig:
        """Validate and normalise user options.

        Raises:
            CompactionConfigError: unknown option, wrong type, or a value out of range.
        """
        if not isinstance(options, Mapping):
            raise CompactionConfigError(
                f"--kv-compaction-config: expected an object of options such as "
                f'{{"ratio": 0.1}}, got {options!r}'
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
        if isinstance(values.get("starters"), list):
            values["starters"] = tuple(values["starters"])
        config = cls(**values)
        config._validate()
        return config

    def _validate(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise CompactionConfigError(
                f"--kv-compaction-config method={self.method!r}: the methods are "
                f"{', '.join(sorted(METHODS))}"
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
            "layer_tokens_per_step": 1,
        }
        if self.merge_slots is not None:
            whole["merge_slots"] = 1
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CompactionConfigError(
                    f"--kv-compaction-config {name}={value!r}: expected a whole number >= {least}"
                )
        for name, low, high in (("query_pool_share", 0.0, 1.0), ("heldout_share", 0.0, 0.5)):
            value = getattr(self, name)
            if (
                not isinstance(value, int | float)
                or isinstance(value, bool)
                or not low <= value <= high
            ):
                raise CompactionConfigError(
                    f"--kv-compaction-config {name}={value!r}: expected a number in "
                    f"[{low:g}, {high:g}]"
                )
        bound = self.max_error
        if bound is not None and (
            not isinstance(bound, int | float)
            or isinstance(bound, bool)
            or not 0 < bound < math.inf
        ):
            raise CompactionConfigError(
                f"--kv-compaction-config max_error={bound!r}: expected a relative error > 0 "
                "such as 0.3, or null for no bound"
            )
        if self.min_span_tokens > self.max_span_tokens:
            raise CompactionConfigError(
                f"--kv-compaction-config min_span_tokens={self.min_span_tokens}: must not exceed "
                f"max_span_tokens={self.max_span_tokens}"
            )
        self._validate_queries()

    def _validate_queries(self) -> None:
        """The texts of the query sources, and that each is of use."""
        if not isinstance(self.instruction, str) or not self.instruction.strip():
            raise CompactionConfigError(
                f"--kv-compaction-config instruction={self.instruction!r}: expected some text"
            )
        starters = self.starters
        if (
            not isinstance(starters, tuple)
            or not starters
            or not all(isinstance(text, str) and text.strip() for text in starters)
        ):
            raise CompactionConfigError(
                f"--kv-compaction-config starters={starters!r}: expected a list of texts"
            )
        if self.prompts_file is not None and (
            not isinstance(self.prompts_file, str) or not self.prompts_file
        ):
            raise CompactionConfigError(
                f"--kv-compaction-config prompts_file={self.prompts_file!r}: expected the path of "
                "a text file with one typical question per line"
            )
        asked, given = self.query_fractions, self.reference_prompts or {}
        if "prompts" in asked and self.prompts_file is None and "prompts" not in given:
            raise CompactionConfigError(
                f"--kv-compaction-config queries={self.queries!r}: prompts needs prompts_file, a "
                "text file with one typical question per line"
            )
        if self.prompts_file is not None and "prompts" not in asked:
            raise CompactionConfigError(
                f"--kv-compaction-config prompts_file={self.prompts_file!r}: has no effect "
                'without queries "prompts" (or a mixture with it); add that'
            )
        if not isinstance(self.on_policy, bool):
            raise CompactionConfigError(
                f"--kv-compaction-config on_policy={self.on_policy!r}: expected true or false"
            )
        if self.on_policy and not self.pass_fraction:
            raise CompactionConfigError(
                f"--kv-compaction-config on_policy={self.on_policy!r}: has no effect without a "
                f"query source that reads texts ({', '.join(PASS_SOURCES)}); queries is "
                f"{self.queries!r}"
            )
        if unused := sorted(set(given) - set(asked)):
            raise CompactionConfigError(
                f"--kv-compaction-config reference_prompts={self.reference_prompts!r}: "
                f"{unused[0]} has no effect, queries is {self.queries!r}"
            )

    @property
    def query_fractions(self) -> dict[str, float]:
        """The sources of reference queries with their fractions, which sum to 1."""
        return {self.queries: 1.0} if isinstance(self.queries, str) else self.queries

    @property
    def rotates_context(self) -> bool:
        """Whether the context's own queries are rotated behind it: unless named as captured."""
        return "context-prefill" not in self.query_fractions

    @property
    def pass_fraction(self) -> float:
        """The share of the reference queries that comes from passes."""
        return sum(f for source, f in self.query_fractions.items() if source in PASS_SOURCES)

    def check_heads(self, layers: int, kv_heads: int) -> None:
        """The heads of a budgets file are the model's.

        Raises:
            CompactionConfigError: naming the first head that the model does not have.
        """
        if isinstance(self.budgets, str):
            return
        for key in self.budgets:
            layer, head = map(int, key[1:].split("H"))
            if layer >= layers or head >= kv_heads:
                raise CompactionConfigError(
                    f"--kv-compaction-config budgets: {key} does not exist in this model of "
                    f"{layers} layers x {kv_heads} KV heads; use a budgets file made for it"
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
            exact = self.recent_tokens + self.protected_tokens + 2 * block_size
            if threshold.tokens < exact:
                raise CompactionConfigError(
                    f"--kv-compaction-threshold={threshold.tokens}: below the {exact} tokens that "
                    f"stay exact (recent_tokens + protected_tokens + two blocks of {block_size}); "
                    f"raise it, or lower recent_tokens in --kv-compaction-config"
                )
        return threshold


@dataclass(frozen=True)
class RequestOverrides:
    """What one request may change, through ``vllm_xargs`` / ``SamplingParams.extra_args``."""

    enabled: bool = True
    ratio: float | None = None
    threshold_tokens: int | None = None

    FIELDS = ("kv_compaction", "kv_compaction_ratio", "kv_compaction_threshold")

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestOverrides:
        """Raises :class:`CompactionConfigError` naming the field."""
        if not extra_args:
            return cls()
        unknown = [
            k for k in extra_args if str(k).startswith("kv_compaction") and k not in cls.FIELDS
        ]
        if unknown:
            raise CompactionConfigError(
                f"{unknown[0]}: unknown field; the fields are {', '.join(cls.FIELDS)}"
            )
        mode = extra_args.get("kv_compaction", "on")
        if mode not in ("on", "off"):
            raise CompactionConfigError(f"kv_compaction={mode!r}: expected 'on' or 'off'")
        ratio = extra_args.get("kv_compaction_ratio")
        threshold = extra_args.get("kv_compaction_threshold")
        return cls(
            enabled=mode == "on",
            ratio=None if ratio is None else parse_ratio(ratio, "kv_compaction_ratio"),
            threshold_tokens=None
            if threshold is None
            else parse_threshold(threshold, "kv_compaction_threshold", allow_share=False).tokens,
        )
