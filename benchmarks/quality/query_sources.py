"""Reference queries of the tensor back end: what the compaction is told it may be asked.

All of them are passes of the model over the document's full cache; none but the last knows the
questions that are graded:

- ``context-prefill``: the document's own queries, from reading it;
- ``context-rotated``: the same, rotated to positions behind the document
  (``vllm_am.compaction.rotate_queries``): nothing has to be read again;
- ``repeat-prefill``: the queries of reading the document a second time behind itself;
- ``prompts``: questions that an operator might have collected, about people of another document,
  with the model's greedy answers;
- ``self-study``: questions that the model itself writes after the document (sampled), with its
  greedy answers;
- ``random``: Gaussian vectors through the layers' q-norm;
- ``paraphrases``: all questions that the document answers, the graded ones among them, but in other
  words: a bound of what question-like queries can do, and what is compacted for a known FAQ.

``{"repeat-prefill": 0.5, "self-study": 0.5}`` mixes sources: fractions of the number of queries; if
one yields less than its fraction, all are scaled down alike (reference code, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.quality.conversations import paraphrased_turn, question_turn
from benchmarks.quality.forward import Forward, Prefix, extend, generate
from benchmarks.recall.documents import make_document
from benchmarks.recall.model import RecallModel
from benchmarks.recall.recipe import BUNDLED, Recipe
from vllm_am.compaction.rotate_queries import distances_behind, rotate_queries

#: Conversations that ``prompts`` and ``self-study`` consist of.
CONVERSATIONS = 64
#: A question has at most some 14 tokens, an answer 17.
QUESTION_TOKENS, ANSWER_TOKENS = 20, 24
SELF_STUDY_TEMPERATURE = 1.0
#: Seeds of documents whose questions serve as ``prompts``: none of those that are graded.
PROMPT_SEED = 1_000_000

Queries = str | Mapping[str, float]


@dataclass
class QuerySources:
    """Reference queries about one document, each source computed once.

    Attributes:
        model: the recall model.
        seed, tokens, density: of the document.
        reading: the pass that read the prompt.
        prefix: what it left, the full cache.
        prompt: the token ids it read.
    """

    model: RecallModel
    seed: int
    tokens: int
    density: str
    reading: Forward
    prefix: Prefix
    prompt: Tensor
    recipe: Recipe = BUNDLED
    _found: dict[str, Tensor] = field(default_factory=dict)

    def get(self, source: Queries, limit: int) -> Tensor:
        """At most ``limit`` queries per key/value head: [H, G * n, E], G runs of n positions.

        Raises:
            ValueError: a source that does not exist, or fractions that do not add up to 1.
        """
        fractions = {source: 1.0} if isinstance(source, str) else dict(source)
        if unknown := sorted(set(fractions) - set(SOURCES)):
            raise ValueError(f"queries: unknown {unknown[0]!r}, known are {', '.join(SOURCES)}")
        if min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
            raise ValueError(f"queries: the fractions of {source} must be positive and add up to 1")
        found = {name: self._source(name) for name in fractions}
        group = self.reading.queries.shape[1]
        positions = limit / group
        for name, fraction in fractions.items():
            positions = min(positions, found[name].shape[2] / fraction)
        parts = [
            _thin(found[name], max(1, int(positions * fraction)))
            for name, fraction in fractions.items()
        ]
        return torch.cat(parts, dim=2).flatten(1, 2)

    def _source(self, name: str) -> Tensor:
        """[H, G, n, E] of one source."""
        if name not in self._found:
            self._found[name] = SOURCES[name](self)
        return self._found[name]


def _thin(queries: Tensor, count: int) -> Tensor:
    """``count`` positions of [H, G, n, E], evenly spread; all of them if there are no more."""
    have = queries.shape[2]
    if have <= count:
        return queries
    return queries[:, :, torch.linspace(0, have - 1, count).round().long()]


def _context_prefill(sources: QuerySources) -> Tensor:
    return sources.reading.queries


def _context_rotated(sources: QuerySources) -> Tensor:
    config = sources.model.config
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    length = sources.prefix.length
    distances = distances_behind(torch.arange(length), length)
    return rotate_queries(sources.reading.queries, distances, config.rope_theta**-exponents)


def _repeat_prefill(sources: QuerySources) -> Tensor:
    return extend(sources.model, sources.prefix, sources.prompt[None]).queries


def _prompts(sources: QuerySources) -> Tensor:
    words = sources.recipe.vocabulary
    questions = make_document(
        PROMPT_SEED + sources.seed, 4000, sources.density, sources.recipe.world
    ).questions[:CONVERSATIONS]
    turns = [[words[word] for word, _ in question_turn(question)] for question in questions]
    return _answered(sources, turns)


def _self_study(sources: QuerySources) -> Tensor:
    """The turn after the document is the user's; what the model samples there are questions."""
    words = sources.recipe.vocabulary
    end = words["<|im_end|>"]
    user = [end, words["<|im_start|>"], words["user"]]
    asked = generate(
        sources.model,
        sources.prefix,
        torch.tensor([user] * CONVERSATIONS),
        end,
        QUESTION_TOKENS,
        SELF_STUDY_TEMPERATURE,
        torch.Generator().manual_seed(sources.seed),
    )
    # What did not end was no question.
    header = [words["<|im_start|>"], words["assistant"]]
    return _answered(sources, [[*user, *row, *header] for row in asked if row[-1] == end])


def _paraphrases(sources: QuerySources) -> Tensor:
    words = sources.recipe.vocabulary
    world = sources.recipe.world
    questions = make_document(sources.seed, sources.tokens, sources.density, world).questions
    others = [paraphrased_turn(question, world) for question in questions]
    turns = [[words[word] for word, _ in turn] for turn in others]
    return _answered(sources, turns)


def _random(sources: QuerySources) -> Tensor:
    """As many as the document has positions; q-norm makes them as long as real ones."""
    generator = torch.Generator().manual_seed(sources.seed)
    queries = torch.randn(sources.reading.queries.shape, generator=generator)
    layers = sources.model.blocks()
    normed = [
        layer.self_attn.q_norm(part)
        for layer, part in zip(layers, queries.chunk(len(layers)), strict=True)
    ]
    return torch.cat(normed).detach()


def _answered(sources: QuerySources, turns: list[list[int]]) -> Tensor:
    """Queries of question turns and of the model's greedy answers to them."""
    end = sources.recipe.vocabulary["<|im_end|>"]
    parts = []
    for length in sorted({len(turn) for turn in turns}):
        starts = torch.tensor([turn for turn in turns if len(turn) == length])
        answers = generate(sources.model, sources.prefix, starts, end, ANSWER_TOKENS)
        for start, answer in zip(starts.tolist(), answers, strict=True):
            ids = torch.tensor([[*start, *answer]])
            parts.append(extend(sources.model, sources.prefix, ids).queries)
    return torch.cat(parts, dim=2)


SOURCES: dict[str, Callable[[QuerySources], Tensor]] = {
    "context-prefill": _context_prefill,
    "context-rotated": _context_rotated,
    "repeat-prefill": _repeat_prefill,
    "prompts": _prompts,
    "self-study": _self_study,
    "random": _random,
    "paraphrases": _paraphrases,
}
