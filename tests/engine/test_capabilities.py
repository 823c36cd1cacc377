"""What is refused at startup: every entry of the table, and that each message helps."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_am.config import CompactionConfigError

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def capabilities(monkeypatch):
    from vllm_am.engine import capabilities

    monkeypatch.setattr(capabilities, "current_platform", machine(cuda=True))
    return capabilities


def machine(cpu: bool = False, cuda: bool = False, capability: int = 90) -> Any:
    """The parts of a vLLM platform that are looked at."""
    return SimpleNamespace(
        is_cpu=lambda: cpu,
        is_cuda=lambda: cuda,
        has_device_capability=lambda needed: capability >= needed,
    )


def supported_config() -> Any:
    """The parts of a VllmConfig that are looked at, all of them fine."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            is_diffusion=False,
            use_mla=False,
            is_hybrid=False,
            is_attention_free=False,
            uses_alibi=False,
            is_mm_prefix_lm=False,
            dtype=torch.bfloat16,
            get_head_size=lambda: 128,
            get_sliding_window=lambda: None,
            hf_text_config=SimpleNamespace(
                num_hidden_layers=1, layer_types=["full_attention"], attn_logit_softcapping=None
            ),
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto", kv_offloading_size=None, block_size=16, prefix_match_unit=None
        ),
        attention_config=SimpleNamespace(backend_per_kind={}),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
            use_ubatching=False,
        ),
        scheduler_config=SimpleNamespace(
            scheduler_cls=None, async_scheduling=True, disable_hybrid_kv_cache_manager=True
        ),
        speculative_config=None,
        kv_transfer_config=None,
    )


def put(path: str, value: Any) -> Callable[[Any], None]:
    """Set one attribute of the configuration, given by its path."""
    *parents, name = path.split(".")

    def apply(config: Any) -> None:
        for parent in parents:
            config = getattr(config, parent)
        setattr(config, name, value)

    return apply


WINDOW = "sliding_attention"


def text(**fields: Any) -> SimpleNamespace:
    """Of a model that has a window."""
    return SimpleNamespace(num_hidden_layers=2, sliding_window=512, **fields)


#: Beginning of the entry's name -> configurations that it refuses.
CASES: dict[str, list[Callable[[Any], None]]] = {
    "pooling and embedding models": [put("model_config.runner_type", "pooling")],
    "encoder-decoder models": [put("model_config.is_encoder_decoder", True)],
    "diffusion models": [put("model_config.is_diffusion", True)],
    "multi-head latent attention": [put("model_config.use_mla", True)],
    "models without attention layers": [put("model_config.is_attention_free", True)],
    "prefix-cache hits within a block": [put("cache_config.prefix_match_unit", 16)],
    "attention in chunks": [
        put("model_config.hf_text_config.attention_chunk_size", 8192),
        put("model_config.hf_text_config.layer_types", ["chunked_attention", "full_attention"]),
    ],
    "models all of whose layers use a sliding window": [
        put("model_config.hf_text_config", text(layer_types=["sliding_attention"])),
        put("model_config.hf_text_config", text(layer_types=None)),
    ],
    "layers with a sliding window or a state without vLLM's hybrid manager": [
        put("model_config.hf_text_config", text(layer_types=["full_attention", WINDOW])),
        put("model_config.is_hybrid", True),
    ],
    "ALiBi": [put("model_config.uses_alibi", True)],
    "attention logit soft-capping": [put("model_config.hf_text_config.attn_logit_softcapping", 50)],
    "models that attend both ways inside an image": [put("model_config.is_mm_prefix_lm", True)],
    "a quantized KV cache": [
        put("cache_config.cache_dtype", dtype) for dtype in ("fp8", "fp8_e5m2", "int8")
    ],
    "a KV cache in another type": [put("cache_config.cache_dtype", "float16")],
    "float32 on a GPU": [put("model_config.dtype", torch.float32)],
    "this head size on a GPU": [
        put("model_config.get_head_size", lambda size=size: size) for size in (8, 100, 264, 512)
    ],
    "this block size on a GPU": [put("cache_config.block_size", size) for size in (8, 24)],
    "batch-invariant execution": [],  # below: not part of the configuration
    "the Rust front end": [],  # likewise
    "microbatches": [put("parallel_config.use_ubatching", True)],
    "attention backends by kind of layer": [
        put("attention_config.backend_per_kind", {"full_attention": "FLASH_ATTN"})
    ],
    "KV connectors": [put("kv_transfer_config", SimpleNamespace(kv_connector="x"))],
    "KV offloading": [put("cache_config.kv_offloading_size", 4.0)],
    "speculation other than n-gram": [
        put("speculative_config", SimpleNamespace(method=method))
        for method in ("eagle", "eagle3", "mtp", "draft_model", "medusa", None)
    ],
    "decode context parallelism": [put("parallel_config.decode_context_parallel_size", 2)],
    "prefill context parallelism": [put("parallel_config.prefill_context_parallel_size", 2)],
    "another scheduler class": [put("scheduler_config.scheduler_cls", "my.Scheduler")],
}


def test_the_cases_and_the_table_match_one_to_one(capabilities):
    entries = [refusal.name for refusal in capabilities.REFUSALS]
    matched = [[key for key in CASES if name.startswith(key)] for name in entries]
    assert [keys[0] for keys in matched if len(keys) == 1] == list(CASES), entries


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(name, change, id=f"{name}-{index}")
        for name, changes in CASES.items()
        for index, change in enumerate(changes)
    ],
)
def test_unsupported_is_refused_with_flag_and_fix(capabilities, name, change):
    config = supported_config()
    change(config)
    (refusal,) = [entry for entry in capabilities.REFUSALS if entry.name.startswith(name)]
    with pytest.raises(capabilities.UnsupportedByCompaction) as error:
        capabilities.check(config)
    assert str(error.value) == (
        f"--kv-compaction does not support {refusal.name} yet: {refusal.fix}"
    )


@pytest.mark.parametrize("variable", ["VLLM_BATCH_INVARIANT", "VLLM_USE_RUST_FRONTEND"])
def test_a_variable_is_refused(capabilities, monkeypatch, variable):
    off = {"VLLM_BATCH_INVARIANT": False, "VLLM_USE_RUST_FRONTEND": False}
    monkeypatch.setattr(capabilities, "envs", SimpleNamespace(**{**off, variable: True}))
    with pytest.raises(capabilities.UnsupportedByCompaction, match=f"unset {variable}"):
        capabilities.check(supported_config())


@pytest.mark.parametrize(
    ("platform", "triton", "refusal"),
    [
        (machine(), True, "platforms other than NVIDIA GPUs and CPUs"),
        (machine(cuda=True, capability=75), True, "GPUs of a compute capability below 8.0"),
        (machine(cuda=True), False, "GPUs without Triton"),
    ],
    ids=["other", "turing", "no-triton"],
)
def test_a_machine_is_refused(capabilities, monkeypatch, platform, triton, refusal):
    monkeypatch.setattr(capabilities, "current_platform", platform)
    monkeypatch.setattr(capabilities, "HAS_TRITON", triton)
    (entry,) = [entry for entry in capabilities.PLATFORM_REFUSALS if entry.name == refusal]
    with pytest.raises(capabilities.UnsupportedByCompaction) as error:
        capabilities.check_platform()
    assert str(error.value) == f"--kv-compaction does not support {refusal} yet: {entry.fix}"


@pytest.mark.parametrize(
    ("platform", "triton"),
    [
        (machine(cpu=True), False),
        (machine(cuda=True, capability=80), True),
        (machine(cuda=True, capability=90), True),
        (machine(cuda=True, capability=100), True),
    ],
    ids=["cpu", "ampere", "hopper", "blackwell"],
)
def test_a_machine_is_taken(capabilities, monkeypatch, platform, triton):
    monkeypatch.setattr(capabilities, "current_platform", platform)
    monkeypatch.setattr(capabilities, "HAS_TRITON", triton)
    capabilities.check_platform()


def test_the_cpu_takes_what_a_gpu_does_not(capabilities, monkeypatch):
    monkeypatch.setattr(capabilities, "current_platform", machine(cpu=True))
    config = supported_config()
    put("model_config.dtype", torch.float32)(config)
    put("model_config.get_head_size", lambda: 8)(config)
    put("cache_config.block_size", 24)(config)
    capabilities.check(config)


def test_every_fix_says_what_to_do(capabilities):
    for refusal in (*capabilities.PLATFORM_REFUSALS, *capabilities.REFUSALS):
        assert any(word in refusal.fix for word in ("drop", "use", "serve", "run")), refusal.name
        assert "--" in refusal.fix, refusal.name


@pytest.mark.parametrize(
    "change",
    [
        lambda config: None,
        put("speculative_config", SimpleNamespace(method="ngram")),
        put("cache_config.cache_dtype", "bfloat16"),
        put("model_config.get_head_size", lambda: 80),
        put("model_config.hf_text_config", SimpleNamespace(num_hidden_layers=2)),
        put(
            "model_config.hf_text_config",
            SimpleNamespace(num_hidden_layers=2, sliding_window=None, layer_types=[WINDOW] * 2),
        ),
    ],
    ids=["plain", "ngram", "bfloat16", "head-size-80", "bare-hf-config", "windows-turned-off"],
)
def test_supported_passes(capabilities, change):
    config = supported_config()
    change(config)
    capabilities.check(config)


def test_a_layer_reveals_what_the_configuration_does_not(capabilities):
    capabilities.check_layer("layer", ALiBi=None, soft_capping=None, attention_sinks=False)
    with pytest.raises(capabilities.UnsupportedByCompaction) as error:
        capabilities.check_layer("layer 3", ALiBi=None, attention_sinks=[0.0])
    assert str(error.value) == (
        "--kv-compaction does not support attention sinks (layer 3) yet: drop --kv-compaction"
    )


# -- through vLLM's own configuration -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "flag", "fix"),
    [
        ({"attention_backend": "FLASH_ATTN"}, "--attention-backend FLASH_ATTN", "drop it"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype", "use --kv-cache-dtype auto"),
        ({"scheduler_cls": "my.Scheduler"}, "--scheduler-cls", "drop --scheduler-cls"),
        ({"worker_cls": "my.Worker"}, "--worker-cls my.Worker", "drop"),
        ({"compaction": {"threshold": 2048}}, "--kv-compaction-threshold=2048", "lower it"),
        ({"compaction": {"threshold": 99}}, "--kv-compaction-threshold=99", "raise it"),
        ({"compaction": {"ratio": 5}}, "--kv-compaction-ratio=5", "in (0, 1]"),
        ({"compaction": "attention-matching"}, "--kv-compaction-config", "an object of options"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_engine_configuration_refuses(engine_config, arguments, flag, fix):
    from vllm_am.engine.capabilities import UnsupportedByCompaction

    with pytest.raises((UnsupportedByCompaction, CompactionConfigError)) as error:
        engine_config(**arguments)
    assert flag in str(error.value) and fix in str(error.value)


WINDOWS = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}
HYBRID = {**WINDOWS, "layer_types": ["full_attention", WINDOW, WINDOW]}


@pytest.mark.parametrize(
    ("overrides", "arguments", "flag", "fix"),
    [
        ({**WINDOWS, "layer_types": [WINDOW] * 3}, {}, "a sliding window", "--disable-sliding-"),
        (HYBRID, {"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cac", "drop --d"),
        (HYBRID, {"compaction": {"cache": "on"}}, "--kv-compaction-cache=on", "drop it"),
        (HYBRID, {"compaction": {"budgets": {"L1H0": 1.0}}}, "budgets: L1H0", "use a budgets file"),
    ],
    ids=["all-windows", "no-hybrid-manager", "cache", "budgets"],
)
def test_what_window_layers_rule_out(engine_config, overrides, arguments, flag, fix):
    from vllm_am.engine.capabilities import UnsupportedByCompaction

    with pytest.raises((UnsupportedByCompaction, CompactionConfigError)) as error:
        engine_config(hf_overrides=overrides, **arguments)
    assert flag in str(error.value) and fix in str(error.value)


def test_only_layers_with_full_attention_get_our_backend(engine_config):
    from vllm_am.engine.limits import EngineLimits

    config = engine_config(hf_overrides=HYBRID)
    assert config.attention_config.backend is None
    assert {k: b.name for k, b in config.attention_config.backend_per_kind.items()} == {
        "full_attention": "CUSTOM"
    }
    limits = EngineLimits.from_vllm_config(config)
    assert limits.num_layers == 1 and limits.window_layers and not limits.caches_prefixes


@pytest.mark.parametrize(
    ("async_scheduling", "kind"),
    [(False, "CompactionScheduler"), (True, "CompactionAsyncScheduler")],
)
def test_engine_configuration_gets_our_classes(engine_config, async_scheduling, kind):
    from vllm_am.engine.frontend.activate import activate

    config = engine_config({"threshold": "80%"})
    assert config.additional_config["kv_compaction"]["threshold"] == "80%"
    assert config.attention_config.backend.name == "CUSTOM"
    # The CPU platform turns async scheduling off: activate once more, as another platform would.
    config.scheduler_config.scheduler_cls = None
    config.scheduler_config.async_scheduling = async_scheduling
    config.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
    activate(config)
    assert config.scheduler_config.scheduler_cls == f"vllm_am.engine.scheduler.scheduler.{kind}"
    assert (
        config.parallel_config.worker_cls == "vllm_am.engine.worker.worker_cpu.CompactionCPUWorker"
    )


def test_planner_knows_the_engines_numbers(engine_config):
    from vllm_am.engine.limits import EngineLimits
    from vllm_am.engine.scheduler.planner import Planner

    config = engine_config({"threshold": 1024, "protected_tokens": 17, "recent_tokens": 33})
    limits = EngineLimits.from_vllm_config(config)
    planner = Planner.of(limits, 77)
    assert (planner.num_blocks, planner.block_size, planner.recent_tokens) == (77, 16, 33)
    assert planner.threshold.tokens == 1024
    assert planner.protected_tokens == 32
    assert planner.in_flight_tokens == config.max_in_flight_tokens > 0
