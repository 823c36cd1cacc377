"""Per-request options: validated where the request enters, so that a mistake is an HTTP 400.

vLLM symbols touched, wrapped when compaction is on: ``v1.engine.async_llm.AsyncLLM.generate``,
which the endpoints of the API servers call before they answer (all but one,
``entrypoints.openai.responses.serving.OpenAIServingResponses``, whose own method is wrapped), and
``v1.engine.input_processor.InputProcessor.process_inputs``, which all other ways to make a request
come through; ``entrypoints.anthropic.serving.AnthropicServingMessages.create_messages``, whose
caller would log a traceback for each refusal. Why: ``vllm_xargs`` are passed through unchecked; a
custom logits processor could validate them, but would cost a pass over the logits of every step and
never sees the prompt. They can go when plugins can validate requests.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from vllm_am.config import CONFIG_KEY, CompactionConfigError, RequestOverrides
from vllm_am.engine.limits import EngineLimits


class RefusedOption(VLLMValidationError):
    """A request's own option is wrong."""


def check(vllm_config: VllmConfig, params: Any, prompt_tokens: int) -> None:
    """Refuse a request whose options are wrong, or let it outgrow the whole KV pool.

    Args:
        prompt_tokens: 0 where the prompt has not been tokenized.

    Raises:
        RefusedOption: naming the field.
    """
    try:
        overrides = RequestOverrides.from_extra_args(getattr(params, "extra_args", None))
        total = vllm_config.cache_config.num_gpu_blocks
        if overrides != RequestOverrides() and total is not None:
            # vLLM sums the pools of data-parallel engines; one block of each is the null block.
            usable = total // vllm_config.parallel_config.data_parallel_size - 1
            tokens = prompt_tokens + (getattr(params, "max_tokens", None) or 0)
            limits = EngineLimits.from_vllm_config(vllm_config)
            limits.check_request(overrides, prompt_tokens or None, tokens, usable)
    except CompactionConfigError as error:
        field = str(error).partition("=")[0].partition(":")[0]
        raise RefusedOption(str(error), parameter=field) from None


def install() -> None:
    """Wrap the front end's ways in; once per process, only when compaction is on."""
    if hasattr(InputProcessor, "_kv_compaction_installed"):
        return
    InputProcessor._kv_compaction_installed = True
    process, generates = InputProcessor.process_inputs, AsyncLLM.generate

    @functools.wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        if is_on(self.vllm_config) and request.sampling_params is not None:
            length = len(request.prompt_token_ids or ())
            check(self.vllm_config, request.sampling_params, length)
        return request

    # Neither this nor the next is a generator: an error must come before "200 OK" is sent.
    @functools.wraps(generates)
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if is_on(self.vllm_config):
            check(self.vllm_config, sampling_params, _length(prompt))
        return generates(self, prompt, sampling_params, *args, **kwargs)

    InputProcessor.process_inputs = process_inputs
    AsyncLLM.generate = generate


def install_in_api_server() -> None:
    """The same for the one endpoint that calls the engine when its answer has begun; and what is
    refused is an answer, not a failure, where the endpoint would log it as one."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    if hasattr(OpenAIServingResponses, "_kv_compaction_installed"):
        return
    OpenAIServingResponses._kv_compaction_installed = True
    generates = OpenAIServingResponses._generate_with_builtin_tools

    @functools.wraps(generates)
    def _generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = self.engine_client.vllm_config
        if is_on(vllm_config):
            check(vllm_config, kwargs["sampling_params"], _length(kwargs["engine_input"]))
        return generates(self, *args, **kwargs)

    OpenAIServingResponses._generate_with_builtin_tools = _generate_with_builtin_tools
    creates = AnthropicServingMessages.create_messages

    @functools.wraps(creates)
    async def create_messages(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await creates(self, *args, **kwargs)
        except RefusedOption as refused:
            return self.create_error_response(refused)

    AnthropicServingMessages.create_messages = create_messages


def _length(prompt: Any) -> int:
    """Tokens of a prompt, where it has been tokenized."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    return len(ids or ())


def is_on(vllm_config: VllmConfig) -> bool:
    """Whether the engine that a request is for compacts; another one of the process may not."""
    return (vllm_config.additional_config or {}).get(CONFIG_KEY) is not None
