"""Attention statistics: every dtype and every way of storing keys, head sizes as in use."""

from __future__ import annotations

from functools import partial

import torch

from tests.kernels.compile_only import CompileCase
from vllm_am.compaction.pages import PagedKV
from vllm_am.compaction.statistics import SCORE_NORMS
from vllm_am.kernels.statistics import attention_lse, attention_statistics
from vllm_am.kernels.statistics import attention_statistics_paged as statistics_paged

KERNELS = ("attention_forward_kernel", "key_scores_kernel")


def spill_limit(dtype: torch.dtype) -> int | None:
    """fp32 caches are for tests: correct, not fast."""
    return None if dtype == torch.float32 else 96


def dense(dtype: torch.dtype, width: int) -> None:
    keys = torch.zeros(2, 64, width, dtype=dtype)
    attention_statistics(keys, keys, keys, scale=1.0, norms=("rms",))


def dense_with_all_options(dtype: torch.dtype, width: int) -> None:
    keys = torch.zeros(2, 64, width, dtype=dtype)
    bias = torch.zeros(2, 64)
    attention_statistics(
        keys, keys, keys, scale=1.0, key_bias=bias, norms=SCORE_NORMS, softcap=30.0
    )
    attention_lse(keys, keys, scale=1.0, key_bias=bias)


def paged(dtype: torch.dtype, width: int) -> None:
    kv = PagedKV.from_layers([torch.zeros(4, 2, 16, 2 * width, dtype=dtype)])
    page_ids = torch.zeros(2, 3, dtype=torch.int32)
    lengths = torch.full((2,), 40, dtype=torch.int32)
    queries = torch.zeros(2, 64, width, dtype=dtype)
    for use_bias in (False, True):
        statistics_paged(kv, page_ids, lengths, queries, scale=1.0, use_bias=use_bias)


CASES = [
    CompileCase(f"{run.__name__}-{str(dtype).removeprefix('torch.')}-{width}",
                partial(run, dtype, width), KERNELS, spill_limit(dtype), on_tensor_cores=True)
    for run, dtype, width in [
        *((dense, torch.bfloat16, width) for width in (64, 80, 128, 256)),
        (dense, torch.float16, 128),
        (dense, torch.float32, 128),
        (dense_with_all_options, torch.bfloat16, 128),
        (paged, torch.bfloat16, 128),
    ]
]  # fmt: skip
