"""A starting point near the circuit that looks facts up.

From random weights a model this small stays for millions of tokens at "the right kind of value, of
the wrong person". So the weights start as a rough drawing of the solution, all of them trained
afterwards. The residual stream is split into four orthogonal parts:

- *content*: which word stands here; words that speak of one attribute share a direction,
- *one*: the same in every word,
- *value*: whether the word is part of a value,
- *context*: empty at first; layer 0 fills it with a running average of the last words' content,
  by heads whose queries and keys see nothing but *one* in mid-range rotary frequencies, which
  makes attention a function of distance alone.

In the later layers queries and keys read the context through the same matrix in the lowest rotary
frequencies, so a word attends to earlier words that followed similar ones, above all to values; the
head then copies their content, which the tied embeddings turn into a prediction.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.recall.model import RecallModel
from benchmarks.recall.world import World

EMBEDDING_SCALE = 0.57
NAME_GAIN, VALUE_GAIN, CUE_GAIN, OTHER_GAIN = 1.6, 1.0, 0.9, 0.35
TOPIC_SHARE = 0.7  # of a cue word's direction
LOCAL_FREQUENCIES = ((3, 12), (5, 16))  # windows of about 5 and 12 words
FIRST_LOW_FREQUENCY = 14
LOCAL_NORM, LOOKUP_NORM = 1.3, 2.0  # gains of the query and key norms: sharpness of attention
VALUE_BONUS = 0.6


@torch.no_grad()
def initialise(
    model: RecallModel, world: World, vocabulary: dict[str, int], generator: torch.Generator
) -> None:
    """Overwrite all weights of `model` with the circuit described above, plus a little noise."""
    config = model.config
    d, half = config.hidden_size, config.hidden_size // 2

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    def rotation(size: int) -> Tensor:
        return torch.linalg.qr(noise(size, size)).Q

    basis = rotation(d)
    content, context = basis[:, : half - 2], basis[:, half:]
    one, value = basis[:, half - 2], basis[:, half - 1]

    vectors, is_value = _word_vectors(world, vocabulary, content.shape[1], noise)
    embedding = vectors @ content.T + one + 0.8 * is_value[:, None] * value
    model.embed_tokens.weight.copy_(EMBEDDING_SCALE * embedding)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(noise(*module.weight.shape))
    for index, layer in enumerate(model.blocks()):
        layer.mlp.down_proj.weight.mul_(0.05)
        attention = layer.self_attn
        e = config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        group = heads // kv_heads
        for kv in range(kv_heads):
            part = kv / max(1, kv_heads - 1)
            if index == 0:
                key = query = _local_map(LOCAL_FREQUENCIES[kv % 2], one, e) + 0.3 * noise(e, d)
                write = 2.0 * context[:, : content.shape[1]] @ content.T
            else:
                lookup = _lookup_map(context, part, e)
                mark = torch.zeros(e)
                mark[[e // 2 - 1, e - 1]] = VALUE_BONUS
                key = lookup + torch.outer(mark, value)
                query = lookup + torch.outer(mark, one)
                write = 0.7 * content @ content.T
            read = rotation(max(e, content.shape[1]))[:e, : content.shape[1]] @ content.T
            rows = slice(kv * e, (kv + 1) * e)
            attention.k_proj.weight[rows] = key + 0.05 * noise(e, d)
            attention.v_proj.weight[rows] = read
            scale = EMBEDDING_SCALE * 2 * d**-0.5 / heads
            for head in range(kv * group, (kv + 1) * group):
                rows = slice(head * e, (head + 1) * e)
                attention.q_proj.weight[rows] = query + 0.05 * noise(e, d)
                attention.o_proj.weight[:, rows] *= 0.01
                attention.o_proj.weight[:, rows] += scale * write @ read.T
        sharpness = LOCAL_NORM if index == 0 else LOOKUP_NORM
        attention.q_norm.weight.fill_(sharpness)
        attention.k_norm.weight.fill_(sharpness)


def _local_map(frequencies: tuple[int, int], one: Tensor, e: int) -> Tensor:
    """[E, D]: the constant direction, put into a band of rotary frequencies."""
    band = torch.zeros(e)
    band[frequencies[0] : frequencies[1]] = 1.0
    band[e // 2 + frequencies[0] : e // 2 + frequencies[1]] = 1.0
    return torch.outer(2.0 * band, one) * one.shape[0] ** -0.5


def _lookup_map(context: Tensor, part: float, e: int) -> Tensor:
    """[E, D]: a window of the context directions, put into the low rotary frequencies.

    `part` slides the window from the first (0) to the last (1) context directions.
    """
    low = range(FIRST_LOW_FREQUENCY, e // 2 - 1)  # the very lowest one carries the value mark
    rows = [f + offset for f in low for offset in (0, e // 2)]
    start = round(part * (context.shape[1] - len(rows)))
    lookup = torch.zeros(e, context.shape[0])
    lookup[rows] = context.T[start : start + len(rows)]
    return lookup


def _word_vectors(
    world: World, vocabulary: dict[str, int], size: int, noise: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Content vectors [vocabulary, size] and which words are part of a value [vocabulary]."""
    own = nn.functional.normalize(noise(len(vocabulary), size), dim=-1)
    topics = nn.functional.normalize(noise(len(world.attributes), size), dim=-1)
    cues = [
        {
            word.lower()
            for sentence in (attribute.answer, *attribute.statements, *attribute.questions)
            for word in sentence.split()
        }
        for attribute in world.attributes
    ]
    options = [value for attribute in world.attributes for value in attribute.values]
    values = {word for value in (*options, *world.offices) for word in value.split()}
    names = {*world.first_names, *world.surnames}
    vectors, is_value = OTHER_GAIN * own, torch.zeros(len(vocabulary))
    for word, i in vocabulary.items():
        about = [topic for topic, words in zip(topics, cues, strict=True) if word.lower() in words]
        if word in names:
            vectors[i] = NAME_GAIN * own[i]
        elif word in values:
            vectors[i], is_value[i] = VALUE_GAIN * own[i], 1.0
        elif len(about) == 1:
            direction = TOPIC_SHARE * about[0] + (1 - TOPIC_SHARE) * own[i]
            vectors[i] = CUE_GAIN * nn.functional.normalize(direction, dim=-1)
    return vectors, is_value
