"""Front ends that are not the process in which ``vllm serve`` parsed the flags."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from benchmarks.serving import HOST, Server, free_port
from tests.engine.driver import OWN_VARIABLES, ROOT
from tests.engine.ray_cluster import ray_cluster

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = ROOT / "benchmarks" / "recall" / "model"
FLAGS = [
    *("--kv-compaction", "attention-matching"),
    *("--kv-compaction-ratio", "10x"),
    *("--kv-compaction-threshold", "512"),
    *("--kv-compaction-config", '{"recent_tokens": 32, "step_ms": 1000}'),
    *("--max-model-len", "2048"),
    *("--num-gpu-blocks-override", "129"),
    *("--block-size", "32"),
    *("--dtype", "float32"),
    *("--served-model-name", "recall"),
    "--enforce-eager",
]
#: Several engines on this machine, each on a core of its own where there are two.
ENGINES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class Setup:
    """How ``vllm serve`` is started, and what of."""

    flags: tuple[str, ...]
    engines: int = 1
    front_ends: int = 1
    ray: bool = False
    """Beside a Ray cluster."""
    headless: tuple[str, ...] = ()
    """Flags of a second ``vllm serve`` that has engines only, on another node as it were."""


DATA_PARALLEL = ("--data-parallel-size", "2")
#: Several API servers of one engine, and of two behind internal load balancing, have wrong options
#: among all else in ``tests/benchmarks/test_soak.py`` and ``test_prefix_server.py``.
SETUPS = {
    "hybrid": Setup(
        (*DATA_PARALLEL, "--data-parallel-hybrid-lb", "--data-parallel-size-local", "2"),
        engines=2,
        front_ends=2,
    ),
    "headless": Setup(
        (*DATA_PARALLEL, "--data-parallel-size-local", "1"),
        engines=2,
        headless=("--headless", "--data-parallel-start-rank", "1"),
    ),
    "ray": Setup(
        ("--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"), ray=True
    ),
}

WRONG = {
    "ratio": ({"kv_compaction_ratio": "0"}, "kv_compaction_ratio"),
    "mode": ({"kv_compaction": "sideways"}, "kv_compaction"),
    "name": ({"kv-compaction": "off"}, "kv-compaction"),
}


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


#: Endpoint -> body of a request with a text.
ENDPOINTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/completions": lambda text: {"prompt": text, "max_tokens": 4},
    "/v1/chat/completions": lambda text: {"messages": messages(text), "max_tokens": 4},
    "/v1/responses": lambda text: {"input": text, "max_output_tokens": 4},
    "/v1/messages": lambda text: {"messages": messages(text), "max_tokens": 4},
}


@pytest.fixture(scope="module", params=SETUPS)
def served(request, tmp_path_factory) -> Iterator[tuple[Server, Setup]]:
    setup = SETUPS[request.param]
    logs = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as environment, ExitStack() as stack:
        for name in (*OWN_VARIABLES, *ENGINES):
            environment.delenv(name, raising=False)
        flags = [*FLAGS, *setup.flags]
        if setup.ray:
            for name, value in stack.enter_context(ray_cluster(ENGINES)).items():
                environment.setenv(name, value)
        if setup.headless:
            flags += ["--data-parallel-address", HOST]
            flags += ["--data-parallel-rpc-port", str(free_port())]
            command = [*flags, *setup.headless]
            stack.enter_context(Server(str(MODEL), command, logs / "headless", ENGINES))
        server = stack.enter_context(Server(str(MODEL), flags, logs / "log", ENGINES))
        environment.undo()  # the server has its environment; other tests need theirs
        server.wait_until_ready()
        yield server, setup


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    """By a connection of its own, so that one of several API servers takes it."""
    url = f"http://127.0.0.1:{server.port}{path}"
    return httpx.post(url, json={"model": "recall", **body}, timeout=120)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("path", ENDPOINTS)
def test_museum_21_22_a_wrong_option_is_a_400_everywhere(served, path, wrong, stream):
    """Whichever API server takes it, and before it answers "200 OK" to a streaming client."""
    server, setup = served
    options, field = wrong
    body = ENDPOINTS[path]("What is it ?")
    lines = len(server.log.read_text(errors="replace").splitlines())
    for _ in range(3 * setup.front_ends):
        reply = post(server, path, **body, vllm_xargs=options, stream=stream)
        assert reply.status_code == 400, reply.text
        assert field in reply.text
    assert post(server, path, **body).status_code == 200
    new = server.log.read_text(errors="replace").splitlines()[lines:]
    assert not [line for line in new if "ERROR" in line or "Traceback" in line]


def test_every_engine_compacts_and_is_counted(served):
    server, setup = served
    engines = setup.engines
    before = server.metrics()
    for number in range(6 * engines):
        prompt = [5 + (7 * i * i + number) % 300 for i in range(900)]
        reply = post(server, "/v1/completions", prompt=prompt, max_tokens=12, ignore_eos=True)
        assert reply.status_code == 200
    delta = server.metrics().since(before)
    counted = delta.by_label("vllm:kv_compaction_compactions_total", "engine")
    assert sum(counted.values()) == 6 * engines
    assert len(counted) == engines
    assert delta.total("vllm:kv_compaction_seconds_count") == 6 * engines


def test_the_startup_line_is_said(served):
    server, _ = served
    lines = server.log_lines("KV compaction is on")
    assert lines and all(re.search(r"keeps 0\.1 of the KV \(10\.0x\)", line) for line in lines)
