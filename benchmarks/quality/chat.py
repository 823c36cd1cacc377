"""A minimal client of the OpenAI chat API, with what vLLM adds to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.serving import ANSWER_SECONDS, Metrics, ServerError, chat_body, request


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        greedy: False leaves temperature and the like to the model's generation config, which
            vLLM applies by itself.
        seed: of the samples.
        thinking: ``enable_thinking`` of the chat template; None does not mention it.
    """

    greedy: bool = False
    seed: int = 0
    thinking: bool | None = None


@dataclass(frozen=True)
class Reply:
    """An answer and its token counts. ``finished`` is False for one that was cut off."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finished: bool


class ChatClient:
    """Requests to one model behind ``base_url`` (without ``/v1``)."""

    def __init__(self, base_url: str, model: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=base_url, timeout=ANSWER_SECONDS, headers=headers)
        self.model = model

    def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int,
        sampling: Sampling,
        options: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> Reply:
        """One completion. A final assistant message is continued, and is part of no reply.

        Args:
            options: ``vllm_xargs`` of the request.
            cache_salt: requests with different salts share no cached prefix.

        Raises:
            ServerError: it could not be reached, or refused.
        """
        body = chat_body(self.model, messages, max_tokens, options, cache_salt)
        body["seed"] = sampling.seed
        if sampling.greedy:
            body["temperature"] = 0
        if sampling.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": sampling.thinking}
        if messages[-1]["role"] == "assistant":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        reply = request(self._http, "POST", "/v1/chat/completions", json=body).json()
        choice = reply["choices"][0]
        message = choice["message"]
        # With a reasoning parser the thinking comes in a field of its own, and is not the answer.
        return Reply(
            message.get("content") or "",
            reply["usage"]["prompt_tokens"],
            reply["usage"]["completion_tokens"],
            choice.get("finish_reason") != "length",
        )

    def metrics(self) -> Metrics | None:
        """Read ``/metrics``; None if the server has none."""
        try:
            return Metrics.parse(request(self._http, "GET", "/metrics").text)
        except ServerError:
            return None

    def close(self) -> None:
        self._http.close()
