"""The quick back end: the recall model in torch, ``vllm_am.compact`` on its cache, no engine.

Every document is read once; each configuration compacts the same cache and answers the same
questions. Spans, whole pages and budgets follow the engine's rules (``engine.planner``,
``engine.fitting``), so that a ratio means the same memory in both back ends. Two differences: the
whole sample of reference queries is fitted on (the engine holds an eighth out), and errors are
measured on the queries of the graded questions themselves, which no fit has seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.conversations import Conversation, SuffixScore
from benchmarks.quality.forward import Forward, Prefix, as_prefix, empty_prefix, extend
from benchmarks.quality.query_sources import Queries, QuerySources
from benchmarks.recall.model import RecallModel, load
from benchmarks.recall.recipe import BUNDLED, Recipe
from vllm_am.compaction import CompactedKV, compact, evaluate_fit
from vllm_am.compaction.budgets import GLOBAL_SCORE, global_pages, pages_by_shares
from vllm_am.compaction.copying_heads import (
    COPIED_TOKENS,
    copying_scores,
    head_weights,
    tokens_to_copy,
)
from vllm_am.compaction.pages import page_slots
from vllm_am.compaction.statistics import attention_statistics
from vllm_am.config import BY_SCORES, CompactionConfig, parse_budgets

_DEFAULTS = CompactionConfig()


@dataclass(frozen=True)
class TensorOptions:
    """What a configuration may say here: names, meaning and defaults of the engine's options."""

    ratio: float
    method: str = _DEFAULTS.method
    budgets: str | dict[str, float] = _DEFAULTS.budgets
    queries: Queries = _DEFAULTS.queries
    reference_queries: int = _DEFAULTS.reference_queries
    recent_tokens: int = _DEFAULTS.recent_tokens
    protected_tokens: int = _DEFAULTS.protected_tokens

    @classmethod
    def from_dict(cls, ratio: float, options: Mapping[str, Any]) -> TensorOptions:
        """Raises ValueError for an option that this back end does not know."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ValueError(
                f"the tensor back end does not know the option {unknown[0]!r}; it knows "
                f"{', '.join(sorted(known))} (the engine back end takes all of the engine's)"
            )
        values = dict(options)
        if "budgets" in values:
            values["budgets"] = parse_budgets(values["budgets"])
        return cls(ratio=ratio, **values)


@dataclass(frozen=True)
class Outcome:
    """One conversation after one compaction.

    Attributes:
        score: of its suffix.
        blocks, full_blocks: that the prompt holds, compacted and not.
        span_blocks, span_full_blocks: the same of the compacted span alone.
        output_error, mass_error: of attention to the span, over the queries of the suffix and all
            heads (see ``compaction.quality``).
        seconds: CPU time of the compaction: the benchmark's machine may be shared.
    """

    score: SuffixScore
    blocks: int
    full_blocks: int
    span_blocks: int
    span_full_blocks: int
    output_error: float
    mass_error: float
    seconds: float


@dataclass
class Reading:
    """A conversation whose prompt has been read; everything below is computed once.

    Attributes:
        seed, tokens, density: of its document.
        recipe: of the model.
    """

    model: RecallModel
    conversation: Conversation
    seed: int
    tokens: int
    density: str
    recipe: Recipe = BUNDLED
    forward: Forward = field(init=False)
    prefix: Prefix = field(init=False)
    sources: QuerySources = field(init=False)

    def __post_init__(self) -> None:
        prompt = torch.tensor(self.conversation.prompt)
        self.forward = extend(self.model, empty_prefix(self.model), prompt[None])
        self.prefix = as_prefix(self.forward)
        self.sources = QuerySources(
            self.model,
            self.seed,
            self.tokens,
            self.density,
            self.forward,
            self.prefix,
            prompt,
            self.recipe,
        )

    @cached_property
    def continuation(self) -> Forward:
        """The suffix, after the full cache."""
        return self._continue(self.prefix)

    @cached_property
    def full_score(self) -> SuffixScore:
        """Of the suffix, after the full cache."""
        return self._score(self.continuation)

    def score_after(self, prefix: Prefix) -> SuffixScore:
        """Of the suffix, after a compacted cache."""
        return self._score(self._continue(prefix))

    def _continue(self, prefix: Prefix) -> Forward:
        return extend(self.model, prefix, torch.tensor([self.conversation.suffix]))

    @torch.no_grad()
    def _score(self, forward: Forward) -> SuffixScore:
        last = self.forward.hidden[0, -1:]  # of the prompt: predicts the first token
        logits = self.model.logits(torch.cat((last, forward.hidden[0, :-1])))
        ids = torch.tensor(self.conversation.suffix)
        log_probs = logits.log_softmax(dim=-1).gather(1, ids.unsqueeze(1)).squeeze(1)
        return SuffixScore(log_probs.tolist(), (logits.argmax(dim=-1) == ids).tolist())


def load_model(recipe: Recipe = BUNDLED) -> RecallModel:
    """One of the recall models."""
    return load(recipe.model)


def run(reading: Reading, options: TensorOptions, block_size: int) -> Outcome:
    """Compact what was read, then ask."""
    tokens = reading.prefix.length
    start = math.ceil(options.protected_tokens / block_size) * block_size
    end = (tokens - options.recent_tokens) // block_size * block_size
    if end <= start:
        raise ValueError(f"a prompt of {tokens} tokens has nothing to compact")
    span = slice(start, end)
    keys, values = reading.prefix.keys[:, span], reading.prefix.values[:, span]
    full = (end - start) // block_size
    # 0.07 * 100 is 7.000000000000001 in binary and must not become 8.
    target = math.ceil(math.ceil(round(options.ratio * (end - start), 6)) / block_size)
    queries = reading.sources.get(options.queries, options.reference_queries)
    group = reading.forward.queries.shape[1]
    scale = reading.model.config.head_dim**-0.5
    heads_per_layer = reading.model.config.num_key_value_heads

    started = time.process_time()
    weights = copying_weights(reading.model) if options.budgets == "auto" else None
    size = page_slots(block_size)
    each = target * block_size // size
    pages = divide_pages(
        options.budgets, keys, values, queries, scale, each, size, heads_per_layer, weights
    )
    budget = (pages * size).clamp(max=end - start)
    compacted = compact(
        keys,
        values,
        queries,
        budget=budget,
        method=options.method,
        scale=scale,
        group_size=group,
    )
    seconds = time.process_time() - started

    prefix = replace_span(reading.prefix, span, compacted)
    errors = evaluate_fit(
        compacted, keys, values, reading.continuation.queries.flatten(1, 2), scale=scale
    )
    exact = math.ceil(tokens / block_size) - full
    return Outcome(
        score=reading.score_after(prefix),
        blocks=exact + target,
        full_blocks=exact + full,
        span_blocks=target,
        span_full_blocks=full,
        output_error=float(errors.output_error.mean()),
        mass_error=float(errors.mass_error.mean()),
        seconds=seconds,
    )


def divide_pages(
    budgets: str | Mapping[str, float],
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    scale: float,
    each: int,
    page_size: int,
    heads_per_layer: int,
    weights: Tensor | None = None,
) -> Tensor:
    """Pages of each head, int64 [H]; ``each`` on average.

    Args:
        budgets: "uniform", "global", "auto", or shares by head as in a budgets file.
        keys, values: [H, T, E]; queries: [H, N, E].
        weights: [H], of the heads' scores ("auto").
    """
    heads, tokens, _ = keys.shape
    total = each * heads
    if budgets == "uniform" or each * page_size >= tokens:
        return torch.full((heads,), each)
    if budgets in BY_SCORES:
        norms = (GLOBAL_SCORE,)
        scores = attention_statistics(keys, values, queries, scale=scale, norms=norms).scores
        return global_pages(scores[GLOBAL_SCORE], total, page_size, weights)
    if isinstance(budgets, str):
        raise ValueError(f"budgets: unknown {budgets!r}")
    names = (f"L{h // heads_per_layer}H{h % heads_per_layer}" for h in range(heads))
    mean = sum(budgets.values()) / len(budgets)  # for heads that the file leaves out
    shares = torch.tensor([budgets.get(name, mean) for name in names])
    return pages_by_shares(shares, total, math.ceil(tokens / page_size))


@cache
def copying_weights(model: RecallModel) -> Tensor:
    """What the scores of each head count for, as the engine's workers find it out; float64 [H]."""
    config = model.config
    first, *copied = tokens_to_copy(config.vocab_size, 1 + 2 * COPIED_TOKENS, None)
    read = extend(model, empty_prefix(model), torch.tensor([[first, *copied, *copied]]))
    second = read.queries[:, :, -len(copied) :]
    return head_weights(copying_scores(second, read.keys.squeeze(1), config.head_dim**-0.5))


def replace_span(prefix: Prefix, span: slice, compacted: CompactedKV) -> Prefix:
    """The prefix with ``span`` of every head replaced by its compacted slots."""
    before, after = slice(0, span.start), slice(span.stop, None)
    keys, values, bias = (
        torch.cat((whole[:, before], part, whole[:, after]), dim=1)
        for whole, part in (
            (prefix.keys, compacted.keys),
            (prefix.values, compacted.values),
            (prefix.bias, compacted.bias),
        )
    )
    return Prefix(keys, values, bias, prefix.length)


def full_cache(reading: Reading, block_size: int) -> Outcome:
    """The same questions without a compaction."""
    blocks = math.ceil(reading.prefix.length / block_size)
    return Outcome(reading.full_score, blocks, blocks, 0, 0, 0.0, 0.0, 0.0)
