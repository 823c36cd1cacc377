"""Installed but not asked for: vLLM stays stock. Each check has a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: Prints what differs from stock vLLM after the plugin was loaded, after an engine without and
#: after one with compaction was configured. Every function of every vLLM class is compared.
SCRIPT = """
import importlib, inspect, json, sys

MODULES = [
    "engine.arg_utils", "platforms", "platforms.cpu", "v1.attention.backends.cpu_attn",
    "v1.attention.backends.registry", "v1.core.kv_cache_manager", "v1.core.sched.async_scheduler",
    "v1.core.sched.scheduler", "v1.core.single_type_kv_cache_manager",
    "v1.engine.async_llm", "v1.engine.core", "v1.engine.input_processor", "v1.engine.llm_engine",
    "v1.kv_cache_interface", "v1.kv_cache_spec_registry", "v1.metrics.loggers",
    "v1.worker.cpu_worker",
]
for name in MODULES:
    importlib.import_module("vllm." + name)

import vllm.plugins
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends import registry
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST as specs

KINDS = (staticmethod, classmethod, property)
register_all_kvcache_specs(None)


def configure(**additional):
    config = EngineArgs(
        sys.argv[1], max_model_len=2048, additional_config=additional
    ).create_engine_config()
    return {
        "scheduler": str(config.scheduler_config.scheduler_cls),
        "worker": config.parallel_config.worker_cls,
        "backend": str(config.attention_config.backend),
    }


def snapshot():
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or not module_name.startswith("vllm."):
            continue
        for class_name, cls in list(vars(module).items()):
            if inspect.isclass(cls) and cls.__module__ == module_name:
                found[module_name, class_name] = cls
                for name, value in list(vars(cls).items()):
                    if inspect.isfunction(value) or isinstance(value, KINDS):
                        found[module_name, class_name, name] = value
    found["backends"] = dict(registry._ATTN_OVERRIDES)
    found["specs"] = {spec: meta.manager_class for spec, meta in specs.items()}
    return found


def differences(before):
    now = snapshot()
    pairs = [(key, value, now.get(key)) for key, value in before.items()]
    return sorted(
        key if isinstance(key, str) else ".".join(key[1:])
        for key, old, new in pairs
        if (old != new if isinstance(key, str) else old is not new)
    )


vllm.plugins.plugins_loaded = True  # EngineArgs loads plugins: not yet
stock_choice = configure()
stock = snapshot()
vllm.plugins.plugins_loaded = False
vllm.plugins.load_general_plugins()
from vllm_am.engine.plugin import register

register()  # a second time, which must change nothing
result = {"compared": len(stock), "loaded": differences(stock)}
result["off_choice_is_stock"] = configure() == configure(mine=1) == stock_choice
result["off"] = differences(stock)
result["imported"] = sorted(m for m in sys.modules if m.startswith("vllm_am.engine."))
result["on_choice"] = configure(kv_compaction={})
result["on"] = differences(stock)
print("RESULT" + json.dumps(result))
"""

FLAGS_AND_SWITCH = [
    "EngineArgs.add_cli_args",
    "EngineArgs.create_engine_config",
]


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def result(tiny_model):
    return json.loads(run_python(SCRIPT, str(tiny_model)).split("RESULT")[1])


def test_loading_the_plugin_wraps_engine_args_only(result):
    assert result["compared"] > 1000  # the comparison saw vLLM
    assert result["loaded"] == FLAGS_AND_SWITCH


def test_engine_without_the_option_is_stock(result):
    assert result["off_choice_is_stock"]
    assert result["off"] == FLAGS_AND_SWITCH
    for part in ("scheduler", "spec", "worker"):
        assert f"vllm_am.engine.{part}" not in result["imported"]


def test_engine_with_the_option_is_not(result):
    """What the comparison above would have seen."""
    assert result["on"] == sorted(
        [
            *FLAGS_AND_SWITCH,
            "AsyncLLM.generate",
            "CpuPlatform.get_attn_backend_cls",
            "InputProcessor.process_inputs",
            "StatLoggerManager.__init__",
            "StatLoggerManager.record",
            "backends",
        ]
    )
    assert result["on_choice"]["worker"] == "vllm_am.engine.worker.worker_cpu.CompactionCPUWorker"
    assert "vllm_am" in result["on_choice"]["scheduler"]
    assert "CUSTOM" in result["on_choice"]["backend"]


def test_the_plain_parts_do_not_import_vllm():
    code = """
import sys
import vllm_am
vllm_am.compact, vllm_am.CompactedKV, vllm_am.CompactionConfig
import vllm_am.compaction.pages
import vllm_am.engine.messages, vllm_am.engine.footprint
import vllm_am.engine.scheduler.planner, vllm_am.engine.scheduler.query_pool
import vllm_am.engine.scheduler.query_sources
print([name for name in sys.modules if name.split(".")[0] == "vllm"])
"""
    assert run_python(code).strip() == "[]"
