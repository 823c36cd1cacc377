"""Per-request options: validated where the request enters, so that a mistake is an HTTP 400.

vLLM symbol touched: ``v1.engine.input_processor.InputProcessor.process_inputs`` is wrapped when
compaction is on. Why: ``vllm_xargs`` are passed through unchecked; a custom logits processor could
validate them, but would cost a pass over the logits of every step and never sees the prompt. It can
go when plugins can validate requests.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_am.config import CONFIG_KEY, CompactionConfigError, RequestOverrides
from vllm_am.engine.limits import EngineLimits


def parse(extra_args: dict[str, Any] | None) -> RequestOverrides:
    """The request's options.

    Raises:
        VLLMValidationError: naming the field.
    """
    try:
        return RequestOverrides.from_extra_args(extra_args)
    except CompactionConfigError as error:
        field = str(error).partition("=")[0].partition(":")[0]
        raise VLLMValidationError(str(error), parameter=field) from None


def check_capacity(vllm_config: VllmConfig, overrides: RequestOverrides, tokens: int) -> None:
    """Refuse a request whose own options let it outgrow the whole KV pool.

    vLLM's startup check makes sure that any request fits; with ``"off"`` or a larger ratio one may
    not, and would be preempted and computed again for ever.

    Args:
        tokens: prompt and longest output together.

    Raises:
        VLLMValidationError: naming the field.
    """
    total = vllm_config.cache_config.num_gpu_blocks
    if overrides == RequestOverrides() or total is None:
        return
    # vLLM sums the pools of data-parallel engines; one block of each is the null block.
    usable = total // vllm_config.parallel_config.data_parallel_size - 1
    limits = EngineLimits.from_vllm_config(vllm_config)
    needed = limits.blocks_needed(overrides, tokens)
    if needed > usable:
        field = next(
            name
            for name, given in (
                ("kv_compaction", not overrides.enabled),
                ("kv_compaction_ratio", overrides.ratio is not None),
                ("kv_compaction_threshold", True),
            )
            if given
        )
        raise VLLMValidationError(
            f"{field}: with this option a request of {tokens} tokens (prompt and max_tokens) may "
            f"need {needed} KV blocks, and the pool has {usable}; lower max_tokens, or drop it",
            parameter=field,
        )


def install() -> None:
    """Wrap the front end's input processing; once per process, only when compaction is on."""
    if hasattr(InputProcessor, "_kv_compaction_installed"):
        return
    InputProcessor._kv_compaction_installed = True
    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if (self.vllm_config.additional_config or {}).get(CONFIG_KEY) is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        overrides = parse(getattr(params, "extra_args", None))
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if request.sampling_params is not None:
            length = len(request.prompt_token_ids or ()) + (request.sampling_params.max_tokens or 0)
            check_capacity(self.vllm_config, overrides, length)
        return request

    InputProcessor.process_inputs = process_inputs
