"""A server that ends while it compacts: on SIGTERM, and when its engine core dies."""

from __future__ import annotations

import signal
import threading
import time

import httpx
import psutil
import pytest

from benchmarks.serving import Server
from tests.engine.test_server import ENVIRONMENT, FLAGS

pytestmark = [pytest.mark.engine, pytest.mark.slow]

#: Four long prompts, compacted slowly: a head per step.
SLOW = [
    "--kv-compaction-config",
    '{"recent_tokens": 32, "step_ms": 0.001, "pressed_step_ms": 0.001}',
]

#: Seconds after which a client hangs up. Now and then a server whose engine is gone waits for the
#: connections of requests that nobody will finish: vLLM's own does, too, without compaction.
PATIENCE = 20


@pytest.mark.parametrize("end", ["SIGTERM", "engine-core-dies"])
def test_server_ends_while_it_compacts(tiny_model, tmp_path, end):
    """No process is left, every client gets an answer, and none waits for ever."""
    replies: list[int | str] = []

    def ask(number: int) -> None:
        prompt = [5 + (7 * i * i + number) % 490 for i in range(1500)]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 900, "ignore_eos": True}
        body["vllm_xargs"] = {"kv_compaction": "force"}
        try:
            url = f"http://127.0.0.1:{server.port}/v1/completions"
            replies.append(httpx.post(url, json=body, timeout=PATIENCE).status_code)
        except httpx.TransportError as error:
            replies.append(type(error).__name__)

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        environment.delenv("VLLM_LOGGING_LEVEL", raising=False)
        flags = [*FLAGS[: FLAGS.index("--kv-compaction-config")], *SLOW]
        flags += FLAGS[FLAGS.index("--kv-compaction-config") + 2 :]
        with Server(str(tiny_model), flags, tmp_path / "log", ENVIRONMENT) as server:
            server.wait_until_ready()
            root = psutil.Process(server.pid)
            family = [root, *root.children(recursive=True)]
            clients = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
            for client in clients:
                client.start()
            wait_for(lambda: server.metrics().total("vllm:kv_compaction_fits_running") > 0)
            if end == "SIGTERM":
                root.send_signal(signal.SIGTERM)
            else:
                core = next(p for p in family if "EngineCore" in p.name() or is_core(p))
                core.kill()
            gone, alive = psutil.wait_procs(family, timeout=PATIENCE + 40)
            for client in clients:
                client.join(timeout=60)
            assert not alive, [p.name() for p in alive]
            assert len(gone) == len(family)
    assert len(replies) == 4, "a client still waits"


def is_core(process: psutil.Process) -> bool:
    return "EngineCore" in " ".join(process.cmdline())


def wait_for(happens, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.05)
