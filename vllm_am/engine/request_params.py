"""Per-request options: validated where the request enters, so that a mistake is an HTTP 400.

vLLM symbol touched: ``v1.engine.input_processor.InputProcessor._validate_params`` is wrapped when
compaction is on. Why: ``vllm_xargs`` are passed through unchecked; a custom logits processor could
validate them, but would cost a pass over the logits of every step. It can go when plugins can
validate extra arguments.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_am.config import CONFIG_KEY, CompactionConfigError, RequestOverrides


def install() -> None:
    """Wrap the front end's validation; once per process, only when compaction is on."""
    if hasattr(InputProcessor, "_kv_compaction_installed"):
        return
    InputProcessor._kv_compaction_installed = True
    original = InputProcessor._validate_params

    @functools.wraps(original)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if CONFIG_KEY in (self.vllm_config.additional_config or {}):
            try:
                RequestOverrides.from_extra_args(getattr(params, "extra_args", None))
            except CompactionConfigError as error:
                field = str(error).partition("=")[0].partition(":")[0]
                raise VLLMValidationError(str(error), parameter=field) from None
        return original(self, params, *args, **kwargs)

    InputProcessor._validate_params = _validate_params
