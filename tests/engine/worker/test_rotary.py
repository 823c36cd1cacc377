"""Queries moved by rotation are those that the model would have computed at the other position."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "partial": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}

CPU = torch.device("cpu")


@pytest.fixture
def rope_of(plugin):
    """vLLM's module for some parameters, inside a model of one layer."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    def build(parameters, neox=True):
        with set_current_vllm_config(VllmConfig()):
            rope = get_rope(32, 1024, neox, parameters, dtype=torch.float32)
        attention = torch.nn.Module()
        attention.rotary_emb = rope
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList([attention])
        return rope, model

    return build


def text_config(**fields):
    return SimpleNamespace(**fields)


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "interleaved"])
@pytest.mark.parametrize("parameters", ROPES.values(), ids=ROPES.keys())
def test_moved_query_is_the_query_at_the_other_position(rope_of, parameters, neox):
    from vllm_am.compaction.rotate_queries import rotate_queries
    from vllm_am.engine.worker.rotary import rotaries

    rope, model = rope_of(parameters, neox)
    (rotary,) = rotaries(model, ["layers.0.attn"], text_config(), CPU)
    assert rotary is not None and rotary.interleaved != neox
    content = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 17, 100, 255, 300])
    shifts = torch.tensor([700, 3, 0, 412, 600, 1])

    def at(where):
        query, _ = rope.forward_native(where, content.flatten(1).clone(), None)
        return query.view_as(content)

    moved = rotate_queries(
        at(positions).transpose(0, 1),
        shifts,
        rotary.inverse_frequencies,
        interleaved=rotary.interleaved,
    )
    torch.testing.assert_close(moved.transpose(0, 1), at(positions + shifts), atol=2e-4, rtol=0)


def test_layers_without_rotation_are_left_alone(rope_of):
    from vllm_am.engine.worker.rotary import rotaries

    _, model = rope_of(ROPES["default"])
    assert rotaries(model, ["layers.0.attn"], text_config(no_rope_layers=[0]), CPU) == [None]
    model.layers[0].rotary_emb = torch.nn.Identity()
    assert rotaries(model, ["layers.0.attn"], text_config(), CPU) == [None]
