"""Compacted prefixes with a name, asked for from outside of the engine: HTTP, ``vllm-am compact``.

vLLM symbols touched (called): ``v1.engine.async_llm.AsyncLLM``, its ``generate`` and, in
``v1.engine.core_client.AsyncMPClient``, ``call_utility_all_async``, which asks all engines of a
data-parallel server; ``renderers.online_renderer.OnlineRenderer`` writes chats as prompts.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_am.config import PREFIX_TOKENS_FIELD, CompactionConfigError, RequestOverrides
from vllm_am.engine.frontend.marked_prefix import common_length
from vllm_am.engine.frontend.request_params import is_on
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.prefix_requests import UTILITY, Answer, PrefixRefused, Refusal

#: Seconds between two looks at what is being compacted.
POLL_SECONDS = 0.05
#: Looks without anything happening after which it is taken that nothing will.
PATIENCE = 20
#: How far the request that has a text compacted goes on behind it, at most: it ends before, when
#: all of it is there.
MOST_TOKENS = 4096

#: How a text that ends within a message may go on.
_ENDS = ("\n\nA", " b")


class Prefixes:
    """Named prefixes of all engines behind one front end."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._vllm_config = engine.vllm_config

    async def ask(self, action: str, **arguments: Any) -> list[Answer]:
        """What each engine answers.

        Raises:
            PrefixRefused: by one of them.
        """
        answers = await self._ask(action, arguments)
        for answer in answers:
            if "refused" in answer:
                raise PrefixRefused(Refusal(answer["refused"]), answer["says"])
        return answers

    async def _ask(self, action: str, arguments: dict[str, Any]) -> list[Answer]:
        if not is_on(self._vllm_config):
            raise PrefixRefused(Refusal.OFF, "this server has no --kv-compaction")
        core: Any = self._engine.engine_core
        answers: list[Answer] = await core.call_utility_all_async(UTILITY, action, arguments)
        return answers

    async def create(
        self,
        name: str,
        token_ids: Sequence[int],
        ratio: float | None = None,
        salt: str | None = None,
    ) -> Answer:
        """Have a text compacted, on every engine, and give it a name.

        Args:
            ratio: None: the server's.
            salt: the cache salt of the requests that are to begin with it.

        Returns:
            its description; it may end before the text, where its last part was not compacted.

        Raises:
            PrefixRefused: by an engine, or it cannot be compacted.
        """
        self._check(token_ids, ratio)
        size = self._vllm_config.cache_config.block_size
        wanted = len(token_ids) // size * size
        pin = {"name": name, "token_ids": list(token_ids), "salt": salt, "ratio": ratio}
        answers = await self.ask("pin", **pin, end=wanted)
        behind = [rank for rank, answer in enumerate(answers) if "name" not in answer]
        if not behind:
            return answers[0]
        alone = len(answers) == 1
        running = [
            asyncio.create_task(self._have_compacted(token_ids, ratio, salt, None if alone else r))
            for r in behind
        ]
        try:
            return await self._follow(pin, wanted, running)
        except BaseException:
            await self._ask("drop", {"name": name})
            raise
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def load(self, name: str, path: str, any_options: bool = False) -> Answer:
        """Read a saved prefix, on every engine; on all of them, or on none.

        Args:
            path: as the engines see it.
            any_options: it may have been compacted with other options.

        Raises:
            PrefixRefused: by one of them.
        """
        try:
            answers = await self.ask("load", name=name, path=path, any_options=any_options)
        except PrefixRefused as refused:
            if refused.why is not Refusal.TAKEN:
                await self._ask("drop", {"name": name})
            raise
        return answers[0]

    def _check(self, token_ids: Sequence[int], ratio: float | None) -> None:
        """Raises :class:`PrefixRefused` for a text that no request could begin with."""
        limits = EngineLimits.from_vllm_config(self._vllm_config)
        if len(token_ids) >= limits.max_model_len:
            raise PrefixRefused(
                Refusal.WRONG,
                f"the text has {len(token_ids)} tokens, and --max-model-len is "
                f"{limits.max_model_len}",
            )
        overrides = RequestOverrides(forced=True, ratio=ratio, prefix_tokens=len(token_ids))
        try:
            blocks = self._vllm_config.cache_config.num_gpu_blocks or 1 << 62
            limits.check_request(overrides, len(token_ids), len(token_ids) + 1, blocks)
        except CompactionConfigError as error:
            raise PrefixRefused(Refusal.WRONG, str(error)) from None

    async def _follow(
        self, pin: dict[str, Any], wanted: int, running: Sequence[asyncio.Task[None]]
    ) -> Answer:
        """Until all of it is there, or nothing happens any more."""
        patience, before = PATIENCE, -1
        while True:
            answers = await self.ask("pin", **pin, end=wanted)
            behind = [answer for answer in answers if "name" not in answer]
            if not behind:
                return answers[0]
            for task in running:
                if task.done() and (error := task.exception()) is not None:
                    raise PrefixRefused(Refusal.WRONG, str(error))
            reached = min(answer["reached"] for answer in behind)
            busy = not all(task.done() for task in running)
            if busy or reached > before or any(answer["coming"] for answer in behind):
                patience, before = PATIENCE, max(before, reached)
            else:
                patience -= 1
            if not patience:
                if not reached:
                    raise PrefixRefused(
                        Refusal.WRONG, "the text could not be compacted; the server's log says why"
                    )
                wanted = reached
            await asyncio.sleep(POLL_SECONDS)

    async def _have_compacted(
        self, token_ids: Sequence[int], ratio: float | None, salt: str | None, rank: int | None
    ) -> None:
        """A request that lives while its text is compacted."""
        config = EngineLimits.from_vllm_config(self._vllm_config).config
        size = self._vllm_config.cache_config.block_size
        extra: dict[str, Any] = {
            "kv_compaction": "force",
            # However short the text is.
            "kv_compaction_threshold": config.recent_tokens + config.protected_tokens + 2 * size,
            PREFIX_TOKENS_FIELD: len(token_ids),
        }
        if ratio is not None:
            extra["kv_compaction_ratio"] = ratio
        room = self._vllm_config.model_config.max_model_len - len(token_ids)
        params = SamplingParams(
            max_tokens=min(MOST_TOKENS, room),
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        prompt: Any = {"prompt_token_ids": list(token_ids)}
        if salt is not None:
            prompt["cache_salt"] = salt
        name = f"kv-compaction-{uuid.uuid4().hex}"
        async for _ in self._engine.generate(prompt, params, name, data_parallel_rank=rank):
            pass


async def prefix_of_chats(
    renderer: OnlineRenderer, messages: list[Answer], goes_on: bool | None = None
) -> list[int]:
    """What all prompts have in common that begin with these messages.

    Args:
        goes_on: the last message does, too: a document with the question behind it. None: so do
            those of users.

    Raises:
        PrefixRefused: it is no chat.
    """
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    text, role = last.get("content"), last.get("role")
    if goes_on is None:
        goes_on = role == "user"
    if goes_on:
        if not isinstance(text, str):
            raise PrefixRefused(Refusal.WRONG, "messages: the content of the last one is no text")
        ends = [[*messages[:-1], {**last, "content": text + end}] for end in _ENDS]
    else:
        other = "assistant" if role == "user" else "user"
        ends = [[*messages, {"role": other, "content": end.strip()}] for end in _ENDS]
    one, other_ids = [await _rendered(renderer, chat) for chat in ends]
    return one[: common_length(one, other_ids)]


async def _rendered(renderer: OnlineRenderer, messages: list[Answer]) -> list[int]:
    try:
        request = ChatCompletionRequest(messages=messages, model="")
        rendered = await renderer.render_chat(request)
        ids: list[int] = rendered[1][0]["prompt_token_ids"]
        return ids
    except Exception as error:
        raise PrefixRefused(
            Refusal.WRONG, f"messages: cannot be written as a prompt ({str(error)[:300]})"
        ) from None
