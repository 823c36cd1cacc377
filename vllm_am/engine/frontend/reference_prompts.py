"""Texts of the reference passes to tokens, in the front end: the engine core has no tokenizer.

vLLM symbol touched: ``tokenizers.cached_tokenizer_from_config``, called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_am.config import (
    CONFIG_KEY,
    PASS_SOURCES,
    CompactionConfig,
    CompactionConfigError,
    shown,
)

#: Stands for the conversation so far when a chat template is asked what follows it.
_ANCHOR = "KV-COMPACTION-ANCHOR"


def encode_reference_prompts(vllm_config: VllmConfig) -> None:
    """Put the token ids of what the passes read into the configuration that all processes get.

    Raises:
        CompactionConfigError: naming the option.
    """
    config = CompactionConfig.from_dict(vllm_config.additional_config[CONFIG_KEY])
    prompts = dict(config.reference_prompts or {})
    if texts := texts_to_encode(config):
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        if tokenizer is None:
            raise CompactionConfigError(
                f"--kv-compaction-config queries={shown(config.queries)}: --skip-tokenizer-init "
                "leaves nothing to encode its texts with; give their token ids in reference_prompts"
            )
        prompts |= encode(texts, tokenizer)
    if prompts:
        check_vocabulary(prompts, vllm_config.model_config.get_vocab_size())
        check_lengths(prompts, config.pass_tokens)
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            CONFIG_KEY: {**config.to_dict(), "reference_prompts": prompts},
        }


def texts_to_encode(config: CompactionConfig) -> dict[str, list[str]]:
    """The texts of every pass source of the mixture that came without token ids.

    Raises:
        CompactionConfigError: a prompts file that cannot be read or says nothing.
    """
    given = config.reference_prompts or {}
    wanted = [s for s in config.query_fractions if s in PASS_SOURCES and s not in given]
    texts: dict[str, list[str]] = {}
    for source in wanted:
        if source == "repeat-prefill":
            texts[source] = [config.instruction]
        elif source == "self-study":
            texts[source] = list(config.starters)
        else:
            texts[source] = read_prompts(config.prompts_file or "")
    return texts


def read_prompts(path: str) -> list[str]:
    """The lines of a prompts file, blank ones left out.

    Raises:
        CompactionConfigError: naming the option.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CompactionConfigError(
            f"--kv-compaction-config prompts_file={shown(path)}: cannot be read ({error}); "
            "expected a text file with one typical question per line"
        ) from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise CompactionConfigError(
            f"--kv-compaction-config prompts_file={shown(path)}: has no line of text; expected one "
            "typical question per line"
        )
    return prompts


def encode(texts: Mapping[str, Sequence[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
    """Token ids of each text as the user's next turn behind a context."""
    return {
        source: [
            list(tokenizer.encode(as_user_turn(text, tokenizer), add_special_tokens=False))
            for text in lines
        ]
        for source, lines in texts.items()
    }


def as_user_turn(text: str, tokenizer: Any) -> str:
    """``text`` as the chat template writes it behind a conversation, up to where an answer begins.

    The template writes a whole conversation with it; what it put after the last answer is taken.
    So whatever ends a turn comes first, and neither a system prompt nor another start token does.
    Without a chat template the text stands in a paragraph of its own.
    """
    if not getattr(tokenizer, "chat_template", None):
        return f"\n\n{text}\n\n"
    conversation = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _ANCHOR},
        {"role": "user", "content": text},
    ]
    written: str = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return written.rpartition(_ANCHOR)[2]


def check_vocabulary(prompts: Mapping[str, Sequence[Sequence[int]]], vocab_size: int) -> None:
    """Raises :class:`~vllm_am.config.CompactionConfigError` for ids that are no tokens."""
    for source, texts in prompts.items():
        largest = max(max(text) for text in texts)
        if largest >= vocab_size:
            raise CompactionConfigError(
                f"--kv-compaction-config reference_prompts: token id {shown(largest)} of {source} "
                f"is not in the model's vocabulary of {vocab_size}; encode its texts with the "
                "model's own tokenizer, or leave them out"
            )


def check_lengths(prompts: Mapping[str, Sequence[Sequence[int]]], pass_tokens: int) -> None:
    """Raises :class:`~vllm_am.config.CompactionConfigError` where a text leaves a pass no room."""
    for source, texts in prompts.items():
        longest = max(map(len, texts))
        if longest >= pass_tokens:
            raise CompactionConfigError(
                f"--kv-compaction-config pass_tokens={pass_tokens}: must exceed the {longest} "
                f"tokens of the longest text of {source}"
            )
