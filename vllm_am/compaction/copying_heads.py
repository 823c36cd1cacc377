"""Which heads look up and copy, and what a key of theirs is worth beside those of other heads.

In a language model few heads carry what is looked up in the context ("induction" heads: the token
behind an earlier occurrence of the present one is about to come again; Olsson et al. 2022, arXiv
2209.11895; and those that find the earlier occurrence itself). A passage or a fact that has lost
its keys there is lost, however well all other heads are kept; and the model's own text, from which
reference queries come, asks for few of them. So a key there counts for more than its attention
says (:func:`vllm_am.compaction.budgets.global_pages`).

The heads belong to the model, not to the text: random tokens, read twice, show them as well as
prose does, at the cost of one short prefill, without a tokenizer and without anybody's data.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Tokens that are read twice.
COPIED_TOKENS = 256
#: With fewer, chance occurrences and the neighbourhood show more than copying does.
LEAST_COPIED_TOKENS = 32
#: A head that puts less of its attention on the copied token does so by chance.
LEAST_SCORE = 0.02
#: By how much the squared score of a key counts for more in a head that does nothing but copy.
#: Tried from 3 to 1000 on SmolLM2-135M and four texts (a probe, without a committed table): flat
#: from 100 on. What it does to the bundled model: ``benchmarks/results/quality.md``.
COPYING_GAIN = 100.0


def tokens_to_copy(vocabulary: int, most: int, first: int | None) -> list[int]:
    """A token to begin with, and random ones, all different: the text that is read twice is behind
    the first.

    Args:
        vocabulary: size of it.
        most: tokens of the first one and of both copies.
        first: what texts begin with (attention that has nothing to look at goes there), if known.

    Returns:
        ``1 + n`` token ids, with n at most :data:`COPIED_TOKENS`; the same in every process.
    """
    count = max(0, min(COPIED_TOKENS, vocabulary, (most - 1) // 2))
    generator = torch.Generator().manual_seed(0)
    drawn: list[int] = torch.randperm(vocabulary, generator=generator)[: count + 1].tolist()
    begin = drawn[-1] if first is None else first
    return [begin, *drawn[:count]]


def copying_scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Mean attention of a text's second reading on what it is about to copy, in the first.

    Args:
        queries: [H, g, n, D], of the second reading, by KV head and query head of its group.
        keys: [H, m + 2 n, D], of everything up to the end: both readings, and what is before them.
        scale: of the attention scores.

    Returns:
        float32 [H] in [0, 1]: of the query head that does it most, on the token that comes next or
        on the same token, whichever is more.
    """
    _, group, count, _ = queries.shape
    before = keys.shape[1] - 2 * count
    sees = torch.ones(count, keys.shape[1], dtype=torch.bool, device=keys.device)
    hidden = ~sees.tril(before + count)
    scores = queries.float().flatten(1, 2) @ keys.float().transpose(1, 2)
    scores = scores.unflatten(1, (group, count)).mul_(scale).masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(dim=-1)
    first = weights[..., before : before + count]
    same = first.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    following = first.diagonal(offset=1, dim1=-2, dim2=-1).mean(dim=-1)
    return torch.maximum(same, following).amax(dim=1)


def head_weights(scores: Tensor) -> Tensor:
    """What a key's score counts for in each head, beside those of other heads.

    Args:
        scores: [H], see :func:`copying_scores`.

    Returns:
        float64 [H] on the CPU, 1 in heads that do not copy.
    """
    found = scores.double().cpu()
    found = torch.where(found >= LEAST_SCORE, found, 0.0)
    return (1 + COPYING_GAIN * found).sqrt()
