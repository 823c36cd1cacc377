"""A common prefix that is marked by messages reaches the engine in tokens."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_am.config import CONFIG_KEY
from vllm_am.engine.frontend import marked_prefix


class Chat(SimpleNamespace):
    """A chat request, as far as it matters here."""

    def model_copy(self, update):
        return Chat(**{**vars(self), **update})


def _render(chat):
    """Each message its numbers behind a 1; a 2 in the end to be answered."""
    if not chat.messages[0]:
        raise ValueError("the first message is empty")
    ids = [n for message in chat.messages for n in (1, *message)]
    return chat.messages, [{"prompt_token_ids": ids + [2] * chat.add_generation_prompt}]


@pytest.fixture
def render(plugin, wrap):
    """The wrapped method; ``vllm_xargs`` as sampling parameters are made from them afterwards."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    async def stock(self, request):
        return _render(request)

    wrap(marked_prefix.install, OpenAIServingChat, render_chat_request=stock)

    async def render_chat(request, skip_mm_cache):
        assert skip_mm_cache
        return _render(request)

    def call(messages, options=CONFIG_KEY, **xargs):
        config = SimpleNamespace(additional_config={options: {}})
        serving = SimpleNamespace(
            engine_client=SimpleNamespace(vllm_config=config),
            online_renderer=SimpleNamespace(render_chat=render_chat),
        )
        chat = Chat(messages=messages, vllm_xargs=xargs or None, add_generation_prompt=True)
        rendered = asyncio.run(OpenAIServingChat.render_chat_request(serving, chat))
        assert rendered == _render(chat)
        return chat.vllm_xargs

    return call


CHAT = [(7, 8, 9), (5,), (6, 6)]


def test_messages_are_counted_in_tokens(render):
    assert render(CHAT, kv_compaction_prefix="messages:1", mine=1) == {
        "kv_compaction_prefix_tokens": 4,
        "mine": 1,
    }
    assert render(CHAT, kv_compaction_prefix="messages:2")["kv_compaction_prefix_tokens"] == 6
    assert render(CHAT, kv_compaction_prefix="messages:3")["kv_compaction_prefix_tokens"] == 9


def test_others_are_left_alone(render):
    assert render(CHAT) is None
    assert render(CHAT, kv_compaction_ratio="5x") == {"kv_compaction_ratio": "5x"}
    xargs = {"kv_compaction_prefix": "messages:9"}
    assert render(CHAT, options="mine", **xargs) == xargs


@pytest.mark.parametrize(
    "mark",
    ["messages:0", "messages:4", "messages", "messages:-1", "message:1", "1", 1, "messages:²", []],
    ids=repr,
)
def test_a_wrong_mark_is_the_callers_error(render, mark):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="messages:1' to 'messages:3'") as error:
        render(CHAT, kv_compaction_prefix=mark)
    assert error.value.parameter == "kv_compaction_prefix"


def test_messages_that_cannot_be_written_alone_are_refused(plugin):
    from vllm.exceptions import VLLMValidationError

    async def fails(request, skip_mm_cache):
        raise TypeError("no user message")

    serving = SimpleNamespace(online_renderer=SimpleNamespace(render_chat=fails))
    chat = Chat(messages=CHAT)
    with pytest.raises(VLLMValidationError, match=r"no user message.*prefix_tokens"):
        asyncio.run(marked_prefix._render_first(serving, chat, 1))


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_length(one, other):
    n = marked_prefix.common_length(one, other)
    assert one[:n] == other[:n]
    assert n in (len(one), len(other)) or one[n] != other[n]
