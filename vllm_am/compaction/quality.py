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


def compare(
    original: AttentionStatistics, compacted: AttentionStatistics, weights: Tensor | None = None
) -> FitQuality:
    """Errors of one set of attention outputs and masses against another, both [H, N, ...].

    Args:
        weights: [N], of the queries in the means; None where all count alike.
    """
    norm = torch.linalg.vector_norm(original.output, dim=2)
    gap = torch.linalg.vector_norm(compacted.output - original.output, dim=2)
    output_error = gap / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    # Equal masses give exactly 0, infinite ones included (a head without keys before and after).
    log_ratio = torch.where(compacted.lse == original.lse, 0.0, compacted.lse - original.lse)
    mass_error = torch.expm1(log_ratio).abs()
    return FitQuality(_mean(output_error, weights), _mean(mass_error, weights))


def _mean(errors: Tensor, weights: Tensor | None) -> Tensor:
    """[H, N] -> float32 [H]."""
    if weights is None:
        return errors.mean(dim=1, dtype=torch.float64).float()
    return (errors.double() @ (weights / weights.sum()).double()).float()
