"""Normal equations: every dtype, head sizes as in use, with and without factors of rows."""

from __future__ import annotations

from functools import partial

import torch

from tests.kernels.compile_cases_statistics import spill_limit
from tests.kernels.compile_only import CompileCase
from vllm_am.kernels.gram import mass_normal_equations, output_normal_equations


def both_fits(dtype: torch.dtype, width: int, softcap: float) -> None:
    keys, queries = torch.zeros(2, 16, width, dtype=dtype), torch.zeros(2, 40, width, dtype=dtype)
    bias, lse, output = torch.zeros(2, 16), torch.zeros(2, 40), torch.zeros(2, 40, width)
    mass_normal_equations(keys, bias, queries, lse, scale=1.0, softcap=softcap)
    output_normal_equations(keys, bias, queries, output, scale=1.0, softcap=softcap)


KERNELS = ("design_matrix_kernel", "attention_forward_kernel")

CASES = [
    CompileCase(
        f"both-fits-{str(dtype).removeprefix('torch.')}-{width}",
        partial(both_fits, dtype, width, softcap),
        KERNELS,
        spill_limit(dtype),
        on_tensor_cores=True,
    )
    for dtype, width, softcap in [
        (torch.bfloat16, 128, 0.0),
        (torch.bfloat16, 256, 30.0),
        (torch.float16, 80, 0.0),
        (torch.float32, 128, 0.0),
    ]
]
