"""Run the GPU's attention backend in vLLM's CPU build: import before vLLM, as ``v2_on_cpu``.

Everything of ours is the real thing: the metadata builder, its buffers and page tables, and the
Triton kernels, through the interpreter. Only what vLLM compiles from CUDA is replaced, by the plain
torch below: FlashAttention (which gets the live tables and returns the log-sum-exp) and the write
into the cache.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from vllm.v1.attention.backends import flash_attn

from vllm_am.engine import classes

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    out: torch.Tensor,
    return_softmax_lse: bool = False,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    """FlashAttention over a paged cache, row by row, in float64.

    Args:
        q, out: [tokens, Hq, D].
        k, v: [blocks, block size, H, D].
        cu_seqlens_q, seqused_k: int32 [rows + 1] and [rows].
        block_table: int32 [rows, width].
        s_aux: [Hq] or None, score of one more key of each query head, whose value is zero.

    Returns:
        out, and with ``return_softmax_lse`` float32 [Hq, tokens]; what is not of any row is NaN.
    """
    assert causal and k.stride(-1) == 1 and len(seqused_k) == len(cu_seqlens_q) - 1
    block_size, kv_heads = k.shape[1:3]
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    for row, length in enumerate(seqused_k.tolist()):
        first, last = cu_seqlens_q[row : row + 2].tolist()
        assert last - first <= max_seqlen_q and length <= max_seqlen_k
        if last == first:
            continue
        blocks = block_table[row, : -(-length // block_size)].long()
        keys, values = (
            cache[blocks].flatten(0, 1)[:length].transpose(0, 1).double() for cache in (k, v)
        )  # [H, length, D]
        queries = q[first:last].double().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        scores = queries @ keys[:, None].transpose(2, 3) * softmax_scale  # [H, group, n, length]
        newest = torch.arange(last - first)[:, None] + (length - (last - first))
        scores.masked_fill_(torch.arange(length) > newest, -torch.inf)
        if s_aux is not None:
            sinks = s_aux.double().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sinks), dim=-1)
            values = torch.cat((values, torch.zeros_like(values[:, :1])), dim=1)
        attended = scores.softmax(-1) @ values[:, None]
        out[first:last] = attended.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
        lse[:, first:last] = scores.logsumexp(-1).flatten(0, 1).float()
    return (out, lse) if return_softmax_lse else out


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *_: Any,
) -> None:
    """Store keys and values [tokens, H, D] into [blocks, block size, H, D]; slot -1 is padding."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    block_size = key_cache.shape[1]
    tokens = len(slot_mapping)
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache[slots // block_size, slots % block_size] = new[:tokens][kept].to(cache.dtype)


# What the module has on a GPU only.
flash_attn.flash_attn_varlen_func = flash_attn_varlen_func
flash_attn.reshape_and_cache_flash = reshape_and_cache_flash
flash_attn.get_flash_attn_version = lambda *, has_sinks=False, **_: 3 if has_sinks else 2
flash_attn.flash_attn_supports_sinks = lambda: True
# The backend is chosen by worker class: the CPU's worker, the GPU's backend.
classes.PLATFORM_CLASSES[CPU_WORKER] = dataclasses.replace(
    classes.PLATFORM_CLASSES[CPU_WORKER],
    attention_backend=classes.PLATFORM_CLASSES[GPU_WORKER].attention_backend,
)
