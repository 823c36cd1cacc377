"""Fixtures of all folders, and a core for each process that runs tests.

Importing vLLM takes ten seconds, so it happens inside fixtures: tests of the plain parts stay
instant when they run alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def take_a_core(worker: str) -> None:
    """Keep a process of ``pytest -n`` and all that it starts to one core, each to its own.

    Engines that share cores wait for each other in every operator: two of them at once take ten
    times as long. Before torch is imported, which starts its threads by these variables. Tests of
    several ranks name the cores of their ranks themselves.
    """
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)


if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    take_a_core(os.environ["PYTEST_XDIST_WORKER"])

import torch  # noqa: E402

from vllm_am.config import CONFIG_KEY  # noqa: E402

#: Triton's switch to its interpreter, see ``tests/kernels/conftest.py``.
INTERPRETER = "TRITON_INTERPRET"

#: Not where the caller has set it: then it stays.
SWITCHES = not torch.cuda.is_available() and INTERPRETER not in os.environ

if SWITCHES:
    os.environ[INTERPRETER] = "1"


def pytest_collection_finish() -> None:
    if SWITCHES:
        os.environ.pop(INTERPRETER, None)


@pytest.fixture(scope="session")
def plugin() -> None:
    """vLLM with this plugin loaded through its entry point."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 whose outputs depend on the whole context."""
    from tests.engine.models import make_random_model

    return make_random_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine_config(plugin: None, tiny_model: Path) -> Callable[..., Any]:
    """Build the configuration of an engine with compaction on; no engine is started."""
    from vllm.engine.arg_utils import EngineArgs

    def build(compaction: Any = None, **arguments: Any) -> Any:
        return EngineArgs(
            model=str(tiny_model),
            **{
                "max_model_len": 2048,
                "block_size": 16,
                "additional_config": {CONFIG_KEY: {} if compaction is None else compaction},
                **arguments,
            },
        ).create_engine_config()

    return build


@pytest.fixture
def wrap(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put stubs into a vLLM class and let one of our ``install`` functions wrap them, undone after
    the test, whether or not the class was already wrapped in this process."""

    def apply(install: Callable[[], None], cls: type, **stubs: Callable[..., Any]) -> None:
        for name, stub in stubs.items():
            monkeypatch.setattr(cls, name, stub)
        flag = "_kv_compaction_installed"
        monkeypatch.setattr(cls, flag, True, raising=False)
        delattr(cls, flag)
        install()
        install()  # vLLM may load plugins more than once: wrapped once all the same

    return apply
