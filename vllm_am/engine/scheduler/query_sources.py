"""Where reference queries come from: mixtures, what the query passes read and write. No vLLM.

Sources (algorithm, section 2.1): the queries of the prompt itself (``context-prefill``, as they
were captured; ``context-rotated``, as if they were asked behind it), those of passes that the
engine runs behind the context (``repeat-prefill``, ``self-study``, ``prompts``), and Gaussian
vectors (``random``). All but the passes cost nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_am.config import PASS_SOURCES, CompactionConfig

#: Fewest tokens of the span that are worth repeating in one pass.
SHORTEST_STRETCH = 16

#: Fewer reference queries than this per kept key make the least squares ill-posed: with as many
#: queries as keys they fit noise (algorithm, section 2.4); the ridge keeps the fit finite.
QUERIES_PER_SLOT = 8


@dataclass(frozen=True)
class PassPlan:
    """One query pass: what is read behind the context, and how much the model then writes."""

    source: str
    tokens: tuple[int, ...]
    answer_tokens: int
    """Most tokens the model writes itself; 0 where the text is given (teacher forcing)."""
    sample_rate: float
    """Share of the pass's token positions whose queries are kept."""

    @property
    def length(self) -> int:
        """Most tokens the pass computes; of what is written, all but the last one."""
        return len(self.tokens) + max(0, self.answer_tokens - 1)

    def written(self, answer: Sequence[int]) -> PassPlan:
        """The same text with what the model wrote, to be read in one go.

        Without the last token, whose query nobody has computed before either.
        """
        return replace(self, tokens=(*self.tokens, *answer[:-1]), answer_tokens=0)


def read_together(
    plans: Sequence[PassPlan], count: int, tokens: int, longest: int
) -> list[PassPlan]:
    """What of ``plans`` one step reads: evenly chosen passes, as many as fit.

    Args:
        plans: passes that write nothing.
        count: passes that may run, at most.
        tokens: that the step has left, over all of them.
        longest: tokens of a pass that vLLM does not cut into chunks.

    Returns:
        the chosen ones, their sample rates raised so that as many queries are kept in all.
    """
    fitting = [plan for plan in plans if len(plan.tokens) <= longest]
    for chosen in range(min(count, len(fitting)), 0, -1):
        found = [fitting[(2 * i + 1) * len(fitting) // (2 * chosen)] for i in range(chosen)]
        read = sum(len(plan.tokens) for plan in found)
        if read <= tokens:
            more = sum(len(plan.tokens) for plan in plans) / read
            return [replace(p, sample_rate=min(1.0, p.sample_rate * more)) for p in found]
    return []


def plan_passes(
    config: CompactionConfig, span_tokens: Sequence[int], room: int, positions: int
) -> list[PassPlan]:
    """The passes of one compaction, for all sources of the mixture that need some.

    Args:
        config: with its ``reference_prompts`` filled in.
        span_tokens: the tokens that are about to be compacted.
        room: positions left behind them, up to ``max_model_len``.
        positions: token positions that give ``reference_queries`` queries per KV head.
    """
    plans: list[PassPlan] = []
    for source, fraction in config.query_fractions.items():
        if source not in PASS_SOURCES:
            continue
        texts = (config.reference_prompts or {}).get(source, [])
        if source == "repeat-prefill":
            found = [(text, 0) for text in _repetitions(texts, span_tokens, config, room)]
        else:
            limit = config.prompts_tokens if source == "prompts" else config.self_study_tokens
            answers = [min(limit, room - len(text) - 1) for text in texts]
            found = [(tuple(t), n) for t, n in zip(texts, answers, strict=True) if n > 0]
        computed = sum(len(text) + max(0, answer - 1) for text, answer in found)
        rate = min(1.0, fraction * positions / max(1, computed))
        plans += [PassPlan(source, text, answer, rate) for text, answer in found]
    return plans


def _repetitions(
    instructions: Sequence[Sequence[int]],
    span_tokens: Sequence[int],
    config: CompactionConfig,
    room: int,
) -> Iterator[tuple[int, ...]]:
    """Each instruction followed by the span's own tokens, in stretches of ``pass_tokens`` at most.

    A short span is repeated in one go, as in the paper. A long one in several passes, each of which
    sees the whole context but repeats one stretch of it: they need room and blocks for a stretch
    only, where repeating a long context in one pass would double the memory of its sequence.
    """
    for instruction in instructions:
        longest = min(config.pass_tokens, room - 1) - len(instruction)
        if longest < min(SHORTEST_STRETCH, len(span_tokens)):
            continue
        count = -(-len(span_tokens) // longest)
        bounds = [len(span_tokens) * i // count for i in range(count + 1)]
        for first, last in itertools.pairwise(bounds):
            yield (*instruction, *span_tokens[first:last])


def select(
    found: Mapping[str, np.ndarray],
    fractions: Mapping[str, float],
    positions: int,
    keep_last: int,
    cut_short: bool,
) -> np.ndarray:
    """The sampled positions that make up the mixture.

    Args:
        found: int64 slots of the query pool by source, in position order.
        fractions: of the mixture.
        positions: positions that give ``reference_queries`` queries per KV head; each source
            contributes at most its fraction of them.
        keep_last: most recent positions of the context that stay in any case (the question).
        cut_short: the passes did not run, or not to their end: the context's queries fill up.

    Returns:
        int64 slots of the query pool, at most ``positions`` (or one for each source).
    """
    limits = {source: max(1, round(share * positions)) for source, share in fractions.items()}
    passes = [
        thin(found[source], limits[source])
        for source in PASS_SOURCES
        if source in fractions and source in found
    ]
    context = limits.get("context-rotated", limits.get("context-prefill", 0))
    if cut_short:
        used = sum(map(len, passes)) + limits.get("random", 0)
        context = max(context, positions - used)
    passes.append(thin(found["context"], context, keep_last))
    return np.concatenate(passes)


def shifts_behind(positions: np.ndarray, end: int) -> np.ndarray:
    """Shifts that carry the queries of a text behind it; those behind it already stay.

    The first lands on ``end``, the others as far behind it as they were behind the first: where
    the same text, repeated, would stand (see ``vllm_am.compaction.rotate_queries``).
    """
    if len(positions) == 0:
        return np.zeros(0, dtype=np.int64)
    return np.where(positions < end, end - positions.min(), 0)


def thin(slots: np.ndarray, count: int, keep_last: int = 0) -> np.ndarray:
    """At most ``count`` of ``slots``, evenly; the last ``keep_last`` first of all."""
    if len(slots) <= count:
        return slots
    last = min(keep_last, count)
    index = np.linspace(0, len(slots) - last - 1, count - last).round().astype(np.int64)
    return np.concatenate([slots[index], slots[len(slots) - last :]])
