"""What a configuration tells of a model's rotation is what the layers themselves turn out to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.engine import driver

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
