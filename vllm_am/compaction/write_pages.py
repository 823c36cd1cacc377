"""Between vLLM's paged KV cache and the dense tensors of the fit: read spans, write pages.

A page is the part of a block that belongs to one (layer, KV head): ``block_size`` slots of
``2 * head_dim`` numbers, key then value, contiguous in head-major layouts. The bias of every slot
lives beside the cache in a float32 tensor of the same geometry. Plain torch, no vLLM: this is the
reference beside which the GPU page writer is tested.
"""

from __future__ import annotations

import torch

from vllm_am.compaction.compact import CompactedKV


def read_span(cache: torch.Tensor, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole blocks of one layer, in token order.

    Args:
        cache: ``[num_blocks, H, block_size, 2 * D]``, any strides.
        block_ids: int64 ``[n]``.

    Returns:
        keys and values, each ``[H, n * block_size, D]`` in the cache's dtype (copies).
    """
    pages = cache[block_ids].transpose(0, 1).flatten(1, 2)  # [H, n * block_size, 2D]
    head_dim = cache.shape[-1] // 2
    return pages[..., :head_dim], pages[..., head_dim:]


def write_pages(
    cache: torch.Tensor, bias: torch.Tensor, block_ids: torch.Tensor, compacted: CompactedKV
) -> None:
    """Write a compacted span into its blocks of one layer; slots left over get bias -inf.

    Args:
        cache: ``[num_blocks, H, block_size, 2 * D]``, written in place.
        bias: float32 ``[num_blocks, H, block_size]``, written in place.
        block_ids: int64 ``[P]`` with ``P * block_size >= t``.
        compacted: keys and values ``[H, t, D]``, bias ``[H, t]`` (-inf where a head has fewer).
    """
    heads, block_size = cache.shape[1:3]
    slots = compacted.keys.shape[1]
    padded = len(block_ids) * block_size
    pages = cache.new_zeros(heads, padded, cache.shape[-1])
    pages[:, :slots] = torch.cat([compacted.keys, compacted.values], dim=-1).to(cache.dtype)
    slot_bias = bias.new_full((heads, padded), float("-inf"))
    slot_bias[:, :slots] = compacted.bias
    shape = (len(block_ids), block_size)
    cache[block_ids] = pages.unflatten(1, shape).transpose(0, 1)
    bias[block_ids] = slot_bias.unflatten(1, shape).transpose(0, 1)
