"""A synthetic attention head with the features that make compaction hard, and its exact errors.

Keys fall into contiguous topical clusters inside a subspace of half the dimension, the first key is
a sink, and queries share a common direction, mix topics and differ in sharpness. The draws and
their order are fixed: published numbers belong to these tensors.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from vllm_am.compaction import CompactedKV

#: Seeds and sizes of the quality tests.
SEEDS = (0, 1, 2, 21, 22)
BUDGETS = (20, 51, 102)


@lru_cache(maxsize=32)
def synthetic_head(
    seed: int, T: int = 1024, d: int = 128, n: int = 3000, m: int = 600
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keys [1, T, d], values [1, T, d], queries [1, n, d], held-out queries [1, m, d], all fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    topics, rank = 24, d // 2
    basis = torch.linalg.qr(normal(d, rank))[0]
    common = basis @ normal(rank)
    common = common / common.norm()
    centers = normal(topics, rank) @ basis.T
    centers = centers / centers.norm(dim=1, keepdim=True)
    topic = torch.randint(0, topics, (T,), generator=generator).sort()[0]

    key_scale = math.sqrt(d) * 0.75
    spread = 0.9 * (normal(T, rank) @ basis.T) / math.sqrt(rank)
    keys = key_scale * (centers[topic] + spread + 0.15 * normal(T, d) / math.sqrt(d))
    keys[0] = key_scale * 2.2 * common  # the sink
    values = normal(topics, d)[topic] * 0.6 + normal(T, d)
    values[0] *= 0.05

    def draw_queries(count: int) -> Tensor:
        mixture = torch.softmax(3.0 * normal(count, topics), 1) @ centers
        sharpness = 0.4 + 1.8 * torch.rand(count, 1, generator=generator)
        noise = 0.5 * (normal(count, rank) @ basis.T) / math.sqrt(rank)
        return math.sqrt(d) * 0.8 * (0.45 * common + sharpness * mixture + noise)

    # 32 live keys, which no test needs but the published numbers were drawn behind.
    torch.randint(0, topics, (32,), generator=generator)
    normal(32, rank)
    queries = draw_queries(n)
    held_out = draw_queries(m)
    return keys[None], values[None], queries[None], held_out[None]


def stack_heads(*heads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Several one-head problems as one batch."""
    return tuple(torch.cat(parts) for parts in zip(*heads, strict=True))


def random_problem(
    H: int, T: int, N: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian keys [H, T, D], values [H, T, D] and queries [H, N, D]: for shapes, not quality."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, T, D), (H, T, D), (H, N, D))
    keys, values, queries = (torch.randn(*s, generator=generator) for s in shapes)
    return keys.to(dtype), values.to(dtype), (1.5 * queries).to(dtype)


def dense_errors(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    kept_keys: Tensor,
    kept_bias: Tensor,
    kept_values: Tensor,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean relative output error and mass error per head, dense and in fp64."""
    K, V, Q = keys.double(), values.double(), queries.double()
    scale = 1 / math.sqrt(K.shape[2])
    full = Q @ K.mT * scale
    if key_bias is not None:
        full = full + key_bias.double().unsqueeze(1)
    kept = Q @ kept_keys.double().mT * scale + kept_bias.double().unsqueeze(1)
    expected = torch.softmax(full, 2) @ V
    actual = torch.softmax(kept, 2) @ kept_values.double()
    output = ((actual - expected).norm(dim=2) / expected.norm(dim=2)).mean(dim=1)
    ratio = torch.exp(torch.logsumexp(kept, 2) - torch.logsumexp(full, 2))
    return output, (ratio - 1).abs().mean(dim=1)


def errors_of(
    compacted: CompactedKV, keys: Tensor, values: Tensor, queries: Tensor
) -> tuple[Tensor, Tensor]:
    return dense_errors(keys, values, queries, compacted.keys, compacted.bias, compacted.values)
