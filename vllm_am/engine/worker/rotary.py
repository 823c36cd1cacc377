"""The rotary embedding of each attention layer, for queries that are moved behind their text.

vLLM symbols touched (read), of ``model_executor.layers.rotary_embedding``: ``RotaryEmbeddingBase``
(``base``), its ``_compute_cos_sin_cache`` and ``is_neox_style``, and
``Phi3LongRoPEScaledRotaryEmbedding`` (``phi3_long_rope_scaled_rope``), which has two tables. The
angles are read off the tables, so scaled variants (linear, Llama 3, YaRN, LongRoPE) need no code of
their own; where they do not grow in proportion to the position, nothing is rotated.

Models that vLLM serves through transformers have neither. They rotate by a function beside their
attention, which is tried out: in one of two ways each position is a rotation by its angles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import (
    Phi3LongRoPEScaledRotaryEmbedding,
)
from vllm.model_executor.models.utils import extract_layer_index

from vllm_am.compaction.rotate_queries import rotate_queries
from vllm_am.engine.layers import FULL
from vllm_am.engine.rotation import has_rotation

logger = init_logger("vllm.kv_compaction")

#: Kinds of rotation of transformers whose angles change with the length of the text.
CHANGING = ("dynamic", "longrope")


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
        found.append(None if skipped else _rotary(model, name, device))
        if found[-1] is None and not skipped:
            logger.warning_once(
                "KV compaction: no plain rotary embedding found in the model's layers; their "
                "queries are used as they were captured (queries: context-rotated has no effect)"
            )
    return found


def _rotary(model: torch.nn.Module, layer_name: str, device: torch.device) -> Rotary | None:
    """The rotary embedding beside an attention layer, in the module that calls both, or that of
    the whole model."""
    parent = model.get_submodule(layer_name.rpartition(".")[0])
    for module in parent.modules():
        if isinstance(module, RotaryEmbeddingBase | Phi3LongRoPEScaledRotaryEmbedding):
            return _from_table(module, device)
    names = ("inv_freq", f"{FULL}_inv_freq")
    found = [(m, getattr(m, n)) for m in model.modules() for n in names if hasattr(m, n)]
    if len(found) != 1:  # a multimodal model has others for its encoders
        return None
    return _from_transformers(*found[0], type(parent).__module__, device)


@cache
def _from_table(module: torch.nn.Module, device: torch.device) -> Rotary | None:
    """Read off the module's table, which the layers of a model usually share."""
    try:
        with torch.device("cpu"):
            table = _table(module).double()
    except (AttributeError, TypeError):
        return None
    if table.dim() != 2 or table.shape[0] < 3:
        return None
    cos, sin = table[:3].chunk(2, dim=-1)
    angles = torch.atan2(sin, cos)
    # The table's rows may be scaled (YaRN), which the angle does not see.
    if not torch.allclose(torch.cos(2 * angles[1]), torch.cos(angles[2]), atol=1e-5):
        return None
    interleaved = not getattr(module, "is_neox_style", True)
    return Rotary(angles[1].to(device), interleaved)


def _table(module: Any) -> torch.Tensor:
    """Cosines and sines of the first positions, [positions, 2 * pairs]."""
    if isinstance(module, Phi3LongRoPEScaledRotaryEmbedding):
        # One of its two tables serves all positions, by the length that the engine is started for.
        scale, factors = (
            (module.long_mscale, module.long_factor)
            if module.use_long_rope
            else (module.short_mscale, module.short_factor)
        )
        return module._compute_cos_sin_cache(3, factors, scale)
    table: torch.Tensor = module._compute_cos_sin_cache()
    return table


@cache
def _from_transformers(
    module: torch.nn.Module, frequencies: torch.Tensor, home: str, device: torch.device
) -> Rotary | None:
    """Of a model of transformers, by what its function does to random vectors.

    Args:
        module: the model's rotary embedding; ``frequencies`` [pairs], of its full-attention layers.
        home: where its attention is defined, and the function that rotates.
    """
    apply: Callable[..., Any] | None = getattr(sys.modules[home], "apply_rotary_pos_emb", None)
    kind = getattr(module, "rope_type", "default")
    kind = kind.get(FULL, "default") if isinstance(kind, dict) else kind
    if apply is None or kind in CHANGING:
        return None
    frequencies = frequencies.detach().cpu().double()
    positions = torch.tensor([0, 1, 5, 300])
    angles = positions[:, None] * frequencies
    content = torch.randn(1, 4, 2 * len(frequencies), dtype=torch.float64)
    both = torch.cat((angles, angles), dim=1)[None]
    try:
        rotated, _ = apply(content[None], content[None], both.cos(), both.sin())
    except (TypeError, RuntimeError, ValueError):
        return None
    for interleaved in (False, True):
        ours = rotate_queries(content, positions, frequencies, interleaved=interleaved)
        if rotated.shape == ours[None].shape and torch.allclose(
            rotated[0].double(), ours, atol=1e-4
        ):
            return Rotary(frequencies.to(device), interleaved)
    return None
