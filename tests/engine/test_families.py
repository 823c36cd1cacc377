"""Model families: served as by stock vLLM where every key is kept, and their queries moved rightly.

What is proven here is what ``vllm-am models`` prints, and the documentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import driver
from tests.engine.models import (
    HYBRIDS,
    STATES,
    make_family_model,
    make_hybrid_model,
    make_state_model,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

IDENTITY = {"ratio": 1.0, "threshold": 128, "recent_tokens": 16}
#: Heads of 32 where a configuration does not say their size: vLLM's own CPU kernel wants that.
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
#: Fields of the configurations, and whether the layers that are compacted rotate.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "Llama": ({}, True),
    "Mistral": ({"sliding_window": None}, True),
    "Qwen2": ({"num_attention_heads": 4}, True),
    "Qwen3": ({}, True),
    "Qwen3Moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, True),
    "Phi3": ({"partial_rotary_factor": 0.5, "num_attention_heads": 4}, True),
    "Glm4": ({"partial_rotary_factor": 0.5}, True),
    "Granite": ({"attention_multiplier": 0.17}, True),
    "GPT2": ({**MHA, "n_positions": 4096}, False),
    # Through transformers.
    "Arcee": ({}, True),
    "Cwm": ({"layer_types": ["full_attention"] * 3, "sliding_window": 96}, True),
    "Glm": ({"partial_rotary_factor": 0.5}, True),
    "GPTNeoX": ({**MHA, "rotary_pct": 0.5}, True),
    "HunYuanDenseV1": ({}, True),
    "Jais2": ({}, True),
    "Olmo": ({}, True),
    "Olmo2": ({}, True),
    "Phi": (MHA, True),
    "SeedOss": ({}, True),
    "SmolLM3": ({"no_rope_layers": [1, 1, 0]}, True),
    "Starcoder2": ({"sliding_window": None}, True),
    **{name: ({}, name not in ("Cohere2", "Exaone4")) for name in HYBRIDS},
    "GraniteMoeHybrid": ({}, False),
    "FalconH1": ({}, True),
    "NemotronH": ({}, False),
}
TEXT, OTHER = tuple(range(5, 69)), tuple(range(100, 137))


def make(path: Path, family: str) -> Path:
    options, _ = FAMILIES[family]
    build = make_hybrid_model if family in HYBRIDS else make_family_model
    build = make_state_model if family in STATES else build
    return build(path, family, **options)


def check_rotation(engine: driver.Engine, rotates: bool) -> None:
    """The queries of the first layer, moved as we do and as the model itself would have.

    A text is read at its beginning and behind another one: what that layer looks for depends on
    nothing but token and position.
    """
    from vllm_am.compaction.rotate_queries import rotate_queries

    state = engine.worker._compaction
    layer, seen = next(iter(state.layers.values())), []
    forward = layer.impl.forward

    def look(module, query, *args, **kwargs):
        if len(query) >= len(TEXT):
            seen.append(query.view(len(query), layer.impl.num_heads, -1).clone())
        return forward(module, query, *args, **kwargs)

    layer.impl.forward = look
    for name, prompt in (("here", TEXT), ("there", (*OTHER, *TEXT))):
        engine.run([driver.Ask(prompt, 2)], names=name)
    layer.impl.forward = forward
    here, there = (query[-len(TEXT) :].transpose(0, 1) for query in seen)
    rotary = state.fitting.rotations[0]
    assert (rotary is not None) == rotates
    if rotary is not None:
        assert not torch.allclose(here, there, atol=0.1)
        here = rotate_queries(
            here,
            torch.full((len(TEXT),), len(OTHER)),
            rotary.inverse_frequencies,
            interleaved=rotary.interleaved,
        )
    torch.testing.assert_close(here, there, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path, plugin):
    """Token for token, and with queries that are moved as the model itself would have computed
    them; or not at all where a layer does not rotate, even if it has the module for it."""
    from vllm_am.engine.layers import full_layers
    from vllm_am.engine.rotation import has_rotation

    rotates = FAMILIES[family][1]
    path = make(tmp_path, family)
    asks = driver.mixed_asks(12, seed=3)
    options = {"skip_tokenizer_init": True, "enable_prefix_caching": False}
    with driver.start(path, **options) as engine:
        stock = engine.run(asks)
    assert len({tuple(output) for output in stock.values()}) > 6
    # Where a block has to hold a state, it has 64 tokens.
    identity = {**IDENTITY, "threshold": 192} if family in STATES else IDENTITY
    with driver.start(path, identity, max_num_batched_tokens=256, **options) as engine:
        assert engine.run(asks) == stock
        assert engine.totals.compactions >= (4 if family in STATES else 6)
        assert not engine.totals.failures
        config = engine.llm.llm_engine.vllm_config.model_config.hf_text_config
        layers, rotations = full_layers(config), engine.worker._compaction.fitting.rotations
        assert len(rotations) == len(layers)
        for index, rotary in zip(layers, rotations, strict=True):
            assert (rotary is not None) == (rotates and has_rotation(config, index))
        # The first layer of gpt-oss has a window; GPT-2 adds positions to what it reads.
        if family not in ("GptOss", "GPT2"):
            check_rotation(engine, rotates)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i / 2 for i in range(8)],
}


@pytest.mark.parametrize("length", [256, 512], ids=["short-factors", "long-factors"])
def test_long_rope_has_one_rotation_for_all_positions(length, tmp_path, plugin):
    """By the length that the engine is started for, whatever the length of a text."""
    original = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256}
    make_family_model(tmp_path, "Phi3", head_dim=16, **original)
    options = {"enable_prefix_caching": False, "max_model_len": length}
    with driver.start(tmp_path, IDENTITY, max_num_batched_tokens=256, **options) as engine:
        check_rotation(engine, rotates=True)


def test_the_table_is_what_is_proven_here():
    """By the types that the configurations have; multimodal ones in test_multimodal.py."""
    import transformers

    from tests.engine.multimodal_case import CLASSES
    from vllm_am.engine.families import FAMILIES as TABLE

    # Qwen3-Next: test_states.py.
    names = (*FAMILIES, *STATES)
    proven = {getattr(transformers, f"{name}Config").model_type for name in names}
    proven |= {getattr(transformers, f"{name}Config").model_type for name in CLASSES}
    assert {kind for family in TABLE for kind in family.model_types} == proven
