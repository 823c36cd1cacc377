"""What the ranks of one engine agree on: whatever one of them says counts for all."""

from __future__ import annotations

import torch
from vllm.distributed import get_pp_group, get_tp_group


def summed_over_ranks(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over all tensor and pipeline ranks, which all call this at the same place of the same
    step.

    Args:
        numbers: on the CPU; overwritten.
    """
    for group in (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            torch.distributed.all_reduce(numbers, group=group.cpu_group)
    return numbers
