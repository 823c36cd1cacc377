"""From scores to attention weights on the CPU: csrc/weigh_scores.cpp.

Its plain-torch reference is in ``vllm_am/compaction/attend.py``, and does the work where there is
no compiler, and for fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_am.kernels.cpu_library import library


def weigh_scores(scores: Tensor, bias: Tensor | None, squares: Tensor | None = None) -> Tensor:
    """As the reference has it.

    Args:
        scores: fp32 [H, N, T], contiguous; become the weights.
        bias: [H, T] or None.
        squares: fp32 [H, T], contiguous, or None; the sums are added to it.
    """
    compiled = library()
    assert compiled is not None
    heads, rows, columns = scores.shape
    lse = scores.new_empty(heads, rows)
    bias = None if bias is None else bias.to(scores.dtype).contiguous()
    assert squares is None or (squares.dtype == torch.float32 and squares.is_contiguous())
    compiled.weigh_scores_float32(
        scores.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        lse.data_ptr(),
        0 if squares is None else squares.data_ptr(),
        heads,
        rows,
        columns,
    )
    return lse
