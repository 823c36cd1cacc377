"""The rotary embedding of each attention layer, for queries that are moved behind their text.

vLLM symbol touched (read): ``model_executor.layers.rotary_embedding.base.RotaryEmbeddingBase``, its
``_compute_cos_sin_cache`` and ``is_neox_style``. The angles are read off that table, so scaled
variants (linear, Llama 3, YaRN) need no code of their own; where they do not grow in proportion to
the position, nothing is rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.models.utils import extract_layer_index

from vllm_am.engine.rotation import has_rotation

logger = init_logger("vllm.kv_compaction")


@dataclass(frozen=True)
class Rotary:
    """How a layer rotates: angle per position of each pair of dimensions, float64."""

    inverse_frequencies: torch.Tensor
    interleaved: bool


def rotaries(
    model: torch.nn.Module, layer_names: list[str], text_config: Any, device: torch.device
) -> list[Rotary | None]:
    """By attention layer, one object for layers that rotate alike; None where queries are not
    rotated, or not in a way that is known."""
    found: list[Rotary | None] = []
    for name in layer_names:
        skipped = not has_rotation(text_config, extract_layer_index(name))
        module = None if skipped else _rotary_module(model, name)
        found.append(None if module is None else _rotary(module, device))
        if found[-1] is None and not skipped:
            logger.warning_once(
                "KV compaction: no plain rotary embedding found in the model's layers; their "
                "queries are used as they were captured (queries: context-rotated has no effect)"
            )
    return found


def _rotary_module(model: torch.nn.Module, layer_name: str) -> RotaryEmbeddingBase | None:
    """The rotary embedding beside an attention layer, in the module that calls both."""
    parent = model.get_submodule(layer_name.rpartition(".")[0])
    return next((m for m in parent.modules() if isinstance(m, RotaryEmbeddingBase)), None)


@cache
def _rotary(module: RotaryEmbeddingBase, device: torch.device) -> Rotary | None:
    """Read off the module's table, which the layers of a model usually share."""
    try:
        with torch.device("cpu"):
            table = module._compute_cos_sin_cache().double()
    except (AttributeError, TypeError):
        return None
    if table.dim() != 2 or table.shape[0] < 3:
        return None
    cos, sin = table[:3].chunk(2, dim=-1)
    angles = torch.atan2(sin, cos)
    # The table's rows may be scaled (YaRN), which the angle does not see.
    if not torch.allclose(torch.cos(2 * angles[1]), torch.cos(angles[2]), atol=1e-5):
        return None
    return Rotary(angles[1].to(device), interleaved=not module.is_neox_style)
