"""Whether the queries of a model can be moved behind their text, as its configuration tells.

The front end knows no more than this, and says it before a worker exists; the workers look at the
layers themselves (``worker/rotary.py``).
"""

from __future__ import annotations

from typing import Any

from vllm_am.config import CompactionConfig
from vllm_am.engine.layers import full_layers, has_window_layers

#: Types of models that rotate in their layers with a sliding window alone, where they have any.
#: Their other layers may have the module for it all the same.
ROTATED_IN_WINDOWS = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe")


def has_rotation(text_config: Any, layer: int) -> bool:
    """Whether a layer is not one of those that the model exempts from rotation."""
    if getattr(text_config, "model_type", None) in ROTATED_IN_WINDOWS:
        return not has_window_layers(text_config) or layer not in full_layers(text_config)
    rotated = getattr(text_config, "no_rope_layers", None) or []  # 0: the layer has no rotation
    return layer >= len(rotated) or bool(rotated[layer])


def rotates(text_config: Any) -> bool:
    """Whether queries of any layer can be moved.

    Args:
        text_config: ``ModelConfig.hf_text_config``, in which vLLM has filled in the field
            ``rope_parameters`` wherever the model rotates.
    """
    parameters = getattr(text_config, "rope_parameters", None)
    if not parameters:
        return False
    return any(has_rotation(text_config, layer) for layer in full_layers(text_config))


def queries_in_effect(config: CompactionConfig, text_config: Any) -> str:
    """The sources of reference queries as they are on this model, for people and for labels."""
    fractions = dict(config.query_fractions)
    if not rotates(text_config) and "context-rotated" in fractions:
        fractions["context-prefill"] = fractions.pop("context-rotated")
    if len(fractions) == 1:
        return next(iter(fractions))
    return " + ".join(f"{share:.0%} {source}" for source, share in sorted(fractions.items()))
