"""Which attention layers of a model are compacted, as its configuration tells.

Those that attend to all of the text. Layers with a sliding window hold no more of it than that, and
layers with a state (state space, linear attention) hold that one alone; they keep their own blocks,
which vLLM hands out to them by itself. The front end and the scheduler know no more than this;
workers go by what vLLM says of each layer (``spec.py``).

vLLM symbol touched (read, one field settled): ``config.VllmConfig``.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

FULL, WINDOW = "full_attention", "sliding_attention"

#: Other names of layers that attend to all of the text; hybrid ones have a state beside it.
_ALSO_FULL = ("attention", "hybrid")


def _kinds(text_config: Any) -> list[str]:
    """As the configuration has them, by layer; empty where it has none."""
    kinds = getattr(text_config, "layer_types", None)
    kinds = kinds or getattr(text_config, "layers_block_type", None) or []
    return list(kinds[: text_config.num_hidden_layers])


def layer_types(text_config: Any) -> list[str]:
    """``FULL``, ``WINDOW`` or another name that the configuration has, by layer.

    Args:
        text_config: ``ModelConfig.hf_text_config``.
    """
    window, kinds = getattr(text_config, "sliding_window", None), _kinds(text_config)
    if not kinds:
        return [FULL if window is None else WINDOW] * text_config.num_hidden_layers
    # vLLM turns windows off by taking their size away.
    full = (*_ALSO_FULL, WINDOW) if window is None else _ALSO_FULL
    return [FULL if kind in full else kind for kind in kinds]


def full_layers(text_config: Any) -> list[int]:
    """Indices of the layers that are compacted."""
    return [index for index, kind in enumerate(layer_types(text_config)) if kind == FULL]


def has_window_layers(text_config: Any) -> bool:
    """Whether some layers hold a window of the text only."""
    return WINDOW in layer_types(text_config)


def has_only_attention(text_config: Any) -> bool:
    """Whether no layer holds a state, nor a part of one, and each attends to something."""
    return set(_kinds(text_config)) <= {FULL, WINDOW, "attention"}


def settle_windows(vllm_config: VllmConfig) -> None:
    """Windows that no sequence reaches are none.

    Where all layers have one, as in Mistral 7B: layers of other models may tell by theirs whether
    they rotate.
    """
    model, text = vllm_config.model_config, vllm_config.model_config.hf_text_config
    window = model.get_sliding_window()
    if window is not None and window >= model.max_model_len and not full_layers(text):
        text.sliding_window = None
        vllm_config.cache_config.sliding_window = None
