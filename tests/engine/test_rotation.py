"""What a configuration tells of a model's rotation is what the layers themselves turn out to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.engine import driver
from tests.engine.models import HYBRIDS, make_family_model, make_hybrid_model

#: ``rope_parameters``, ``no_rope_layers`` -> whether any of two layers rotates.
CONFIGURATIONS = {
    "plain": ({"rope_type": "default"}, None, True),
    "scaled": ({"rope_type": "yarn", "factor": 4.0}, None, True),
    "one-layer": ({"rope_type": "default"}, [0, 1], True),
    "no-layer": ({"rope_type": "default"}, [0, 0], False),
    "long": ({"rope_type": "longrope"}, None, True),
    "learned-positions": (None, None, False),
}


@pytest.mark.parametrize(
    ("rope", "layers", "expected"), CONFIGURATIONS.values(), ids=CONFIGURATIONS
)
def test_rotates(rope, layers, expected):
    from vllm_am.engine.rotation import rotates

    text_config = SimpleNamespace(rope_parameters=rope, no_rope_layers=layers, num_hidden_layers=2)
    assert rotates(text_config) == expected


def test_a_mixture_is_told_with_its_fractions():
    from vllm_am.config import CompactionConfig
    from vllm_am.engine.rotation import queries_in_effect

    config = CompactionConfig.from_dict({"queries": {"context-rotated": 1, "repeat-prefill": 3}})
    told = queries_in_effect(config, SimpleNamespace())
    assert told == "25% context-prefill + 75% repeat-prefill"


@pytest.fixture(scope="module")
def learned_positions(tmp_path_factory):
    """A random GPT-2: positions are embedded, and nothing is rotated."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=1024, n_embd=64, n_layer=2, n_head=2, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_model", "learned_positions"])
def test_the_layers_do_what_the_configuration_tells(request, model, monkeypatch):
    """And the startup line names a source that has no effect."""
    from vllm_am.engine.frontend import activate
    from vllm_am.engine.rotation import rotates

    said = []
    monkeypatch.setattr(activate.logger, "info", lambda text, *v, **_: said.append(text % v))
    with driver.start(
        request.getfixturevalue(model),
        {"ratio": 0.1, "threshold": 256, "recent_tokens": 16},
        max_model_len=1024,
        skip_tokenizer_init=True,
    ) as engine:
        rotations = engine.worker._compaction.fitting.rotations
        told = rotates(engine.llm.llm_engine.vllm_config.model_config.hf_text_config)
        assert (
            told == all(r is not None for r in rotations) == any(r is not None for r in rotations)
        )
        engine.run([driver.Ask(tuple(range(5, 500)), 8)])
        assert engine.totals.compactions == 1
    (line,) = [line for line in said if "is on" in line]
    source = "queries context-rotated," if told else "queries context-prefill (the model has no"
    assert source in line


#: Families that vLLM serves by code of its own or through transformers, with fields of their own:
#: whether their full-attention layers rotate.
FAMILIES = {
    "Qwen3": ({}, True),
    "Phi3": ({"partial_rotary_factor": 0.5, "head_dim": 16}, True),
    "Arcee": ({}, True),
    "Cwm": ({"layer_types": ["full_attention"] * 3, "sliding_window": 96}, True),
    "Glm": ({"partial_rotary_factor": 0.5}, True),
    "GPTNeoX": ({"num_key_value_heads": 8, "head_dim": 16, "rotary_pct": 0.5}, True),
    "HunYuanDenseV1": ({}, True),
    "Jais2": ({}, True),
    "Olmo": ({}, True),
    "Olmo2": ({}, True),
    "Phi": ({"num_key_value_heads": 8, "head_dim": 16}, True),
    "SeedOss": ({}, True),
    "SmolLM3": ({"no_rope_layers": [1, 1, 0]}, True),
    "Starcoder2": ({"sliding_window": None}, True),
    # Of gpt-oss the first layer has a window, and what later ones look for depends on the text.
    **{name: ({}, name in ("Gemma3Text", "Olmo3")) for name in HYBRIDS if name != "GptOss"},
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i / 2 for i in range(8)],
}


def moved_as_the_model_would(path, **options) -> list[bool]:
    """Whether each compacted layer rotates; the queries of the first are compared.

    A text is read at its beginning and behind another one: what the first layer looks for depends
    on nothing but token and position.
    """
    import torch

    from vllm_am.compaction.rotate_queries import rotate_queries

    text, other = tuple(range(5, 69)), tuple(range(100, 137))
    compaction = {"ratio": 0.5, "threshold": 192, "recent_tokens": 16}
    options = {"enable_prefix_caching": False, "skip_tokenizer_init": True, **options}
    with driver.start(path, compaction, max_num_batched_tokens=256, **options) as engine:
        state = engine.worker._compaction
        layer, seen = next(iter(state.layers.values())), []
        forward = layer.impl.forward

        def look(module, query, *args, **kwargs):
            if len(query) >= len(text):
                seen.append(query.view(len(query), layer.impl.num_heads, -1).clone())
            return forward(module, query, *args, **kwargs)

        layer.impl.forward = look
        engine.run([driver.Ask(text, 2)])
        engine.run([driver.Ask((*other, *text), 2)])
        rotations = state.fitting.rotations
    here, there = (query[-len(text) :].transpose(0, 1) for query in seen)
    if (rotary := rotations[0]) is not None:
        assert not torch.allclose(here, there, atol=0.1)
        here = rotate_queries(
            here,
            torch.full((len(text),), len(other)),
            rotary.inverse_frequencies,
            interleaved=rotary.interleaved,
        )
    torch.testing.assert_close(here, there, atol=2e-3, rtol=1e-3)
    return [rotary is not None for rotary in rotations]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_queries_are_moved_as_the_model_itself_would_have_computed_them(family, tmp_path, plugin):
    """Or not at all where a layer does not rotate, even if it has the module for it."""
    from transformers import AutoConfig

    from vllm_am.engine.rotation import rotates

    options, expected = FAMILIES[family]
    make = make_hybrid_model if family in HYBRIDS else make_family_model
    make(tmp_path, family, **options)
    rotated = moved_as_the_model_would(tmp_path)
    assert rotated == ([True, True, False] if family == "SmolLM3" else [expected] * len(rotated))
    assert rotates(AutoConfig.from_pretrained(tmp_path)) == expected


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("length", [256, 512], ids=["short-factors", "long-factors"])
def test_long_rope_has_one_rotation_for_all_positions(length, tmp_path, plugin):
    """By the length that the engine is started for, whatever the length of a text."""
    make_family_model(
        tmp_path,
        "Phi3",
        head_dim=16,
        rope_parameters=LONG_ROPE,
        original_max_position_embeddings=256,
    )
    assert moved_as_the_model_would(tmp_path, max_model_len=length) == [True] * 3
