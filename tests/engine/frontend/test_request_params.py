"""Per-request options are checked where a request enters, so that a mistake is an HTTP 400."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.config.test_config import BAD_REQUESTS, _short
from vllm_am.config import CONFIG_KEY, RequestOverrides


@pytest.fixture
def validate(plugin, wrap):
    """The wrapped method on a fake front end; vLLM's own part answers with what it was given."""
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_am.engine.frontend import request_params

    def stock(self, request_id, prompt, params, supported_tasks):
        return SimpleNamespace(
            prompt_token_ids=prompt, sampling_params=params, seen=(request_id, supported_tasks)
        )

    wrap(request_params.install, InputProcessor, process_inputs=stock)

    def call(extra_args, additional_config=None):
        if additional_config is None:
            additional_config = {CONFIG_KEY: {}}
        config = SimpleNamespace(
            additional_config=additional_config,
            cache_config=SimpleNamespace(num_gpu_blocks=None),
        )
        params = SimpleNamespace(extra_args=extra_args, max_tokens=4)
        request = InputProcessor.process_inputs(
            SimpleNamespace(vllm_config=config), "r1", [5, 6], params, ("generate",)
        )
        assert request.sampling_params is params
        assert request.seen == ("r1", ("generate",))

    return call


@pytest.mark.parametrize(("extra", "field"), BAD_REQUESTS, ids=_short)
def test_invalid_value_is_the_callers_error_and_names_the_field(validate, extra, field):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as error:
        validate(extra)
    assert error.value.parameter == field
    assert field in str(error.value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize(
    "extra",
    [None, {}, {"kv_compaction": "off"}, {"kv_compaction_ratio": "5x"}, {"another_plugin": []}],
    ids=repr,
)
def test_valid_request_reaches_vllm_unchanged(validate, extra):
    validate(extra)


def test_api_servers_refuse_before_they_answer(plugin, wrap):
    """What an endpoint calls raises; what it would iterate over came too late for a 400."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_am.engine.frontend import request_params

    async def stock(self, prompt, sampling_params, request_id, *, priority=0):
        yield prompt, sampling_params, request_id, priority

    wrap(request_params.install, InputProcessor, process_inputs=lambda self: None)
    original = AsyncLLM.generate
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={CONFIG_KEY: {}}, cache_config=SimpleNamespace(num_gpu_blocks=None)
        )
    )
    good = SimpleNamespace(extra_args={"kv_compaction_ratio": "5x"}, max_tokens=4)
    bad = SimpleNamespace(extra_args={"kv_compaction_ratio": "5"}, max_tokens=4)
    prompt = {"prompt_token_ids": [5, 6]}
    with pytest.raises(VLLMValidationError, match="kv_compaction_ratio"):
        original(engine, prompt, bad, "r1")
    assert hasattr(original(engine, prompt, good, "r1", priority=1), "__anext__")


@pytest.mark.parametrize("additional_config", [{}, {"mine": 1}, {CONFIG_KEY: None}], ids=repr)
def test_engine_without_compaction_is_not_checked(validate, additional_config):
    validate({"kv_compaction": "maybe"}, additional_config)


@pytest.fixture
def small_pool(engine_config):
    """A finished configuration whose pool holds 1,024 tokens beside the null block."""
    config = engine_config(
        {"ratio": 0.1, "threshold": 256}, max_model_len=8192, max_num_batched_tokens=128
    )
    block = config.cache_config.block_size
    config.cache_config.num_gpu_blocks = 1024 // block + 1
    return config


@pytest.mark.parametrize(
    ("overrides", "tokens", "field"),
    [
        (RequestOverrides(), 8192, None),
        (RequestOverrides(enabled=False), 1024, None),
        (RequestOverrides(enabled=False), 1025, "kv_compaction"),
        (RequestOverrides(ratio=0.5), 900, None),
        (RequestOverrides(ratio=0.5), 8000, "kv_compaction_ratio"),
        (RequestOverrides(threshold_tokens=6000), 8000, "kv_compaction_threshold"),
    ],
    ids=lambda v: repr(v) if not isinstance(v, RequestOverrides) else "",
)
def test_options_that_outgrow_the_pool_are_refused(small_pool, overrides, tokens, field):
    """Else the request would be preempted and computed again for ever."""
    from vllm.exceptions import VLLMValidationError

    from vllm_am.engine.frontend.request_params import check

    names = ("kv_compaction", "kv_compaction_ratio", "kv_compaction_threshold")
    given = (None if overrides.enabled else "off", overrides.ratio, overrides.threshold_tokens)
    extra = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    params = SimpleNamespace(extra_args=extra, max_tokens=100)
    if field is None:
        check(small_pool, params, tokens - 100)
        return
    with pytest.raises(VLLMValidationError, match="KV blocks") as error:
        check(small_pool, params, tokens - 100)
    assert error.value.parameter == field


@pytest.mark.parametrize(
    ("extra", "prompt", "message"),
    [
        ({"kv_compaction_prefix_tokens": 2000}, 2000, None),
        ({"kv_compaction_prefix_tokens": 2000}, 0, None),  # not tokenized yet
        ({"kv_compaction_prefix_tokens": 2001}, 2000, "the prompt has 2000 tokens"),
        ({"kv_compaction_prefix_tokens": 20}, 2000, "not worth compacting"),
        ({"kv_compaction_prefix_tokens": 999, "kv_compaction": "off"}, 999, "kv_compaction='off'"),
        ({"kv_compaction_prefix_tokens": 999, "kv_compaction_cache": "off"}, 999, "cache='off'"),
    ],
    ids=repr,
)
def test_a_marked_prefix_that_cannot_be_shared_is_refused(engine_config, extra, prompt, message):
    from vllm.exceptions import VLLMValidationError

    from vllm_am.engine.frontend.request_params import check

    config = engine_config({"threshold": 256}, max_model_len=8192, max_num_batched_tokens=128)
    config.cache_config.num_gpu_blocks = 10_000
    params = SimpleNamespace(extra_args=extra, max_tokens=10)
    if message is None:
        check(config, params, prompt)
        return
    with pytest.raises(VLLMValidationError, match=message) as error:
        check(config, params, prompt)
    assert error.value.parameter == "kv_compaction_prefix_tokens"


@pytest.mark.parametrize("field", ["kv_compaction_prefix_tokens", "kv_compaction_cache"])
def test_sharing_is_refused_where_nothing_is_shared(engine_config, field):
    from vllm.exceptions import VLLMValidationError

    from vllm_am.engine.frontend.request_params import check

    config = engine_config({"threshold": 256, "cache": "off"}, max_model_len=8192)
    config.cache_config.num_gpu_blocks = 10_000
    value = "on" if field == "kv_compaction_cache" else 900
    with pytest.raises(VLLMValidationError, match="shares no compacted prefixes") as error:
        check(config, SimpleNamespace(extra_args={field: value}, max_tokens=10), 1000)
    assert error.value.parameter == field
