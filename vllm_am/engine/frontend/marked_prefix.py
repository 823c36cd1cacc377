"""``kv_compaction_prefix: "messages:1"``: how many tokens a chat's first messages are.

vLLM symbol touched, wrapped in API servers when compaction is on:
``entrypoints.openai.chat_completion.serving.OpenAIServingChat.render_chat_request``, which the
Anthropic endpoint comes through, too. Why: users count messages, the engine counts tokens, and only
there are a chat and the prompt that it becomes seen together. It can go when vLLM tells plugins
where each message of a prompt ends.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_am.config import PREFIX_FIELD, PREFIX_TOKENS_FIELD, shown
from vllm_am.engine.frontend.request_params import is_on


def install() -> None:
    """Wrap the rendering of chats; once per process, only when compaction is on."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    if hasattr(OpenAIServingChat, "_kv_compaction_installed"):
        return
    OpenAIServingChat._kv_compaction_installed = True
    renders = OpenAIServingChat.render_chat_request

    @functools.wraps(renders)
    async def render_chat_request(self: Any, request: Any) -> Any:
        mark = (request.vllm_xargs or {}).get(PREFIX_FIELD)
        if mark is None or not is_on(self.engine_client.vllm_config):
            return await renders(self, request)
        first = counted(mark, len(request.messages))
        rendered = await renders(self, request)
        if isinstance(rendered, tuple):
            part = await _render_first(self, request, first)
            tokens = common_length(_ids(rendered[1][0]), part)
            others = {k: v for k, v in request.vllm_xargs.items() if k != PREFIX_FIELD}
            request.vllm_xargs = {PREFIX_TOKENS_FIELD: tokens, **others}
        return rendered

    OpenAIServingChat.render_chat_request = render_chat_request


def counted(mark: Any, messages: int) -> int:
    """The number in ``messages:1``.

    Args:
        messages: how many the chat has.

    Raises:
        VLLMValidationError: it is none, or not between 1 and that.
    """
    found = re.fullmatch(r"messages:([0-9]{1,9})", mark) if isinstance(mark, str) else None
    if found is None or not 1 <= int(found[1]) <= messages:
        raise VLLMValidationError(
            f"{PREFIX_FIELD}={shown(mark)}: expected 'messages:1' to 'messages:{messages}', the "
            "messages of this chat that others begin with, too",
            parameter=PREFIX_FIELD,
        )
    return int(found[1])


async def _render_first(serving: Any, request: Any, count: int) -> Sequence[int]:
    """Token ids of the first messages alone; raises VLLMValidationError."""
    part = request.model_copy(
        update={
            "messages": request.messages[:count],
            "add_generation_prompt": False,
            "continue_final_message": False,
        }
    )
    try:
        # Not kept in the cache of images: they are there already.
        rendered = await serving.online_renderer.render_chat(part, skip_mm_cache=True)
        return _ids(rendered[1][0])
    except Exception as error:
        raise VLLMValidationError(
            f"{PREFIX_FIELD}='messages:{count}': the chat template cannot write these messages "
            f"alone ({shown(str(error) or type(error).__name__)}); give {PREFIX_TOKENS_FIELD}",
            parameter=PREFIX_FIELD,
        ) from None


def _ids(engine_input: Any) -> Sequence[int]:
    ids: Sequence[int] = engine_input["prompt_token_ids"]
    return ids


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that two texts have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
