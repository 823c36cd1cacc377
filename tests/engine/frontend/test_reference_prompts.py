"""Texts of the reference passes, from the options to token ids in the configuration."""

from __future__ import annotations

import pytest

from tests.engine.driver import ROOT
from vllm_am.config import CONFIG_KEY, STARTERS, CompactionConfig, CompactionConfigError

RECALL_MODEL = ROOT / "benchmarks" / "recall" / "model"


@pytest.fixture(scope="module")
def chat_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(RECALL_MODEL)


@pytest.fixture
def module(plugin):
    from vllm_am.engine.frontend import reference_prompts

    return reference_prompts


def test_text_becomes_the_next_user_turn(module, chat_tokenizer):
    """Whatever ends the turn before comes first, and the answer is about to begin."""
    assert module.as_user_turn("Who is mayor?", chat_tokenizer) == (
        "<|im_end|>\n<|im_start|>user\nWho is mayor?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_with_a_system_prompt_does_not_repeat_it(module, chat_tokenizer, monkeypatch):
    template = "<s>{{ 'You are kind. ' }}" + chat_tokenizer.chat_template
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    written = module.as_user_turn("Who is mayor?", chat_tokenizer)
    assert written.startswith("<|im_end|>") and "kind" not in written


def test_without_a_template_the_text_is_a_paragraph(module):
    assert module.as_user_turn("Who is mayor?", object()) == "\n\nWho is mayor?\n\n"


def test_token_ids_are_those_of_the_text(module, chat_tokenizer):
    ids = module.encode({"prompts": ["Who is mayor ?"]}, chat_tokenizer)["prompts"][0]
    assert chat_tokenizer.decode(ids).count("<|im_start|>") == 2
    assert ids[0] == chat_tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_texts_come_from_the_options(module, tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("One?\n\n  Two?  \n", encoding="utf-8")
    options = {
        "queries": {"repeat-prefill": 1, "self-study": 1, "prompts": 1},
        "prompts_file": str(file),
        "instruction": "Again!",
    }
    assert module.texts_to_encode(CompactionConfig.from_dict(options)) == {
        "repeat-prefill": ["Again!"],
        "self-study": list(STARTERS),
        "prompts": ["One?", "Two?"],
    }
    given = {"repeat-prefill": [[1]], "prompts": [[2]]}
    with_ids = CompactionConfig.from_dict({**options, "reference_prompts": given})
    assert set(module.texts_to_encode(with_ids)) == {"self-study"}, "ids given need no text"


@pytest.mark.parametrize("content", [None, b"\n \n", b"\xff\xfe\x00"])
def test_bad_prompts_file_is_refused_by_name(engine_config, tmp_path, content):
    file = tmp_path / "questions.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CompactionConfigError) as error:
        engine_config({"queries": "prompts", "prompts_file": str(file)})
    message = str(error.value)
    assert message.startswith("--kv-compaction-config prompts_file=") and str(file) in message
    assert "one typical question per line" in message


def test_prompts_need_their_file():
    with pytest.raises(CompactionConfigError, match="prompts needs prompts_file"):
        CompactionConfig.from_dict({"queries": {"prompts": 0.5, "self-study": 0.5}})
    with pytest.raises(CompactionConfigError, match=r"prompts_file='x\.txt': has no effect"):
        CompactionConfig.from_dict({"prompts_file": "x.txt"})
    with pytest.raises(CompactionConfigError, match="prompts has no effect"):
        CompactionConfig.from_dict({"reference_prompts": {"prompts": [[1]]}})


def test_ids_reach_the_configuration_of_every_process(engine_config):
    config = engine_config({"queries": "repeat-prefill", "instruction": "w7 w8 w9"})
    sent = CompactionConfig.from_dict(config.additional_config[CONFIG_KEY])
    assert sent.reference_prompts == {"repeat-prefill": [[7, 8, 9]]}
    assert config.compute_hash(), "vLLM hashes the configuration as JSON"


def test_nothing_is_encoded_without_a_source_that_reads(engine_config):
    config = engine_config({"queries": "context-prefill"}, skip_tokenizer_init=True)
    assert config.additional_config[CONFIG_KEY]["reference_prompts"] is None


def test_without_a_tokenizer_ids_are_asked_for(engine_config):
    with pytest.raises(CompactionConfigError) as error:
        engine_config({"queries": "self-study"}, skip_tokenizer_init=True)
    assert "queries='self-study'" in str(error.value)
    assert "--skip-tokenizer-init" in str(error.value) and "reference_prompts" in str(error.value)
    given = {"queries": "self-study", "reference_prompts": {"self-study": [[5, 6]]}}
    config = engine_config(given, skip_tokenizer_init=True)
    assert config.additional_config[CONFIG_KEY]["reference_prompts"] == {"self-study": [[5, 6]]}


def test_text_that_leaves_a_pass_no_room_is_refused(engine_config):
    instruction = " ".join(["w5"] * 64)
    with pytest.raises(CompactionConfigError, match=r"pass_tokens=64: must exceed the 64 tokens"):
        engine_config({"queries": "repeat-prefill", "instruction": instruction, "pass_tokens": 64})


def test_token_ids_that_the_model_does_not_have(engine_config):
    """In the engine they would be looked up in the embedding, which dies."""
    for ids, refused in ([511, 5], False), ([512, 5], True), ([10**9, 5], True):
        options = {"queries": "prompts", "reference_prompts": {"prompts": [[7], ids]}}
        if not refused:
            engine_config(options)
            continue
        with pytest.raises(CompactionConfigError, match=f"token id {ids[0]} of prompts") as error:
            engine_config(options)
        assert "vocabulary of 512" in str(error.value)
