"""How well a compacted cache stands in for the original, seen by given queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_am.compaction.statistics import AttentionStatistics


@dataclass(frozen=True)
class FitQuality:
    """Attributes, float32 [H] each:
    output_error: mean over queries of |Y' - Y| / |Y|.
    mass_error: mean over queries of |mass' / mass - 1|.

    A cache that keeps nothing has 1 and 1.
    """

    output_error: Tensor
    mass_error: Tensor


def compare(original: AttentionStatistics, compacted: AttentionStatistics) -> FitQuality:
    """Errors of one set of attention outputs and masses against another, both [H, N, ...]."""
    norm = torch.linalg.vector_norm(original.output, dim=2)
    gap = torch.linalg.vector_norm(compacted.output - original.output, dim=2)
    output_error = gap / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    # Equal masses give exactly 0, infinite ones included (a head without keys before and after).
    log_ratio = torch.where(compacted.lse == original.lse, 0.0, compacted.lse - original.lse)
    mass_error = torch.expm1(log_ratio).abs()
    return FitQuality(
        output_error.mean(dim=1, dtype=torch.float64).float(),
        mass_error.mean(dim=1, dtype=torch.float64).float(),
    )
