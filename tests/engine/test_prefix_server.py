"""Named prefixes over HTTP, behind several front ends and engines; and files of ``vllm-am``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.demo import Density, make_tasks
from benchmarks.serving import Server
from tests.engine.driver import OWN_VARIABLES, ROOT, environment_of_servers

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = ROOT / "benchmarks" / "recall" / "model"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_PLUGINS": "vllm_am",
}
ENGINE = [
    *("--max-model-len", "4096"),
    *("--block-size", "32"),
    *("--dtype", "float32"),
    "--enforce-eager",
]
FLAGS = [
    *("--kv-compaction", "attention-matching"),
    *("--kv-compaction-ratio", "20x"),
    *("--num-gpu-blocks-override", "401"),
    *("--served-model-name", "recall"),
    "--enable-prompt-tokens-details",
    *ENGINE,
]
COMMANDS = Path(sys.executable).parent
PREFIXES = "/v1/kv_compaction/prefixes"
TASKS = make_tasks(2, 2000, Density.SPARSE, 6)
DOCUMENT = TASKS[0].document.text


def serving(folder: Path, *flags: str) -> Server:
    with pytest.MonkeyPatch.context() as environment:
        for name in (*OWN_VARIABLES, *ENVIRONMENT):
            environment.delenv(name, raising=False)
        return Server(str(MODEL), [*FLAGS, *flags], folder / "log", ENVIRONMENT)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """Two API servers, two engines."""
    folder = tmp_path_factory.mktemp("prefixes")
    config = f'{{"prefix_folder": "{folder}", "step_ms": 1000}}'
    flags = ("--data-parallel-size", "2", "--kv-compaction-config", config)
    with pytest.MonkeyPatch.context() as environment:
        for name in (*OWN_VARIABLES, *ENVIRONMENT):
            environment.delenv(name, raising=False)
        with serving(folder, *flags) as running:
            environment.undo()
            running.wait_until_ready()
            running.folder = folder
            yield running


def call(server: Server, method: str, path: str, **body: Any) -> httpx.Response:
    """By a connection of its own, so that one of several API servers takes it."""
    url = f"http://127.0.0.1:{server.port}{path}"
    return httpx.request(method, url, json=body or None, timeout=300)


def answer(server: Server, question: str, **more: Any) -> dict[str, Any]:
    content = f"{DOCUMENT}\n\n{question}"
    body = {
        "model": "recall",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 32,
        "temperature": 0,
        **more,
    }
    found = call(server, "POST", "/v1/chat/completions", **body)
    assert found.status_code == 200, found.text
    return found.json()


def cached(found: dict[str, Any]) -> int:
    return found["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_life_of_a_prefix(server):
    """Compacted on both engines, used, saved, dropped, loaded again."""
    messages = [{"role": "user", "content": DOCUMENT}]
    made = call(server, "POST", PREFIXES, name="contract", messages=messages)
    assert made.status_code == 200, made.text
    tokens = made.json()["tokens"]
    assert tokens > 1900
    again = call(server, "POST", PREFIXES, name="contract", messages=messages)
    assert again.json() == made.json()
    for _ in range(4):  # whichever front end is asked
        listed = call(server, "GET", PREFIXES).json()["prefixes"]
        assert [each["name"] for each in listed] == ["contract"]
    before = server.metrics()
    right = 0
    for task in TASKS[:6]:
        found = answer(server, task.question.text)
        assert cached(found) == tokens
        right += task.question.value in found["choices"][0]["message"]["content"]
    assert right >= 5
    gained = server.metrics().since(before)
    assert gained.total("vllm:kv_compaction_cache_hits_total") == 6
    assert gained.total("vllm:kv_compaction_compactions_total") == 0
    salted = answer(server, TASKS[0].question.text, cache_salt="another tenant")
    assert cached(salted) == 0
    saved = call(server, "POST", f"{PREFIXES}/contract/save")
    assert saved.status_code == 200, saved.text
    assert saved.json()["file"] == str(server.folder / "contract.kv")
    assert (server.folder / "contract.kv").stat().st_size == saved.json()["bytes"]
    assert call(server, "DELETE", f"{PREFIXES}/contract").status_code == 200
    assert call(server, "GET", PREFIXES).json() == {"prefixes": []}
    loaded = call(server, "POST", PREFIXES, name="contract", load=True)
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["tokens"] == tokens
    assert cached(answer(server, TASKS[1].question.text)) == tokens
    assert call(server, "DELETE", f"{PREFIXES}/contract").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("DELETE", "/none", {}, 404, "no such prefix"),
        ("POST", "/none/save", {}, 404, "no such prefix"),
        ("POST", "", {"name": "x", "load": True}, 404, "no such file"),
        ("POST", "", {"name": "x"}, 400, "give one of messages, prompt and load"),
        ("POST", "", {"name": "x", "prompt": "too short"}, 400, "not worth compacting"),
        ("POST", "", {"name": "x", "prompt": "cat " * 5000}, 400, "--max-model-len"),
        ("POST", "", {"name": "x", "prompt": DOCUMENT, "ratio": 7}, 400, "ratio"),
        ("POST", "", {"name": "x", "messages": [{"role": "user"}]}, 400, "messages"),
        ("POST", "", {"name": "x", "messages": ["?"]}, 400, "messages"),
        ("POST", "", {"name": "../x", "prompt": DOCUMENT}, 400, "name"),
        ("POST", "", {"name": "x", "prompt": DOCUMENT, "file": "/etc/passwd"}, 400, "file"),
        ("POST", "/..%2Fx/save", {}, 404, "Not Found"),
    ],
)
def test_what_is_wrong_is_said(server, method, path, body, status, message):
    """And harms nobody."""
    found = call(server, method, PREFIXES + path, **body)
    assert found.status_code == status, found.text
    assert message in found.text
    assert call(server, "GET", PREFIXES).json() == {"prefixes": []}


def test_a_file_that_is_none(server):
    (server.folder / "broken.kv").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    found = call(server, "POST", PREFIXES, name="broken", load=True)
    assert found.status_code == 400
    assert "is no compacted prefix" in found.text
    (server.folder / "broken.kv").write_bytes(b"\xff" * 40)
    assert call(server, "POST", PREFIXES, name="broken", load=True).status_code == 400
    assert answer(server, TASKS[0].question.text)["choices"]


def test_a_wrong_option_is_a_400_at_each_front_end(server):
    """Before it answers "200 OK" to a streaming client; the others are served."""
    for number in range(12):
        body = {"model": "recall", "prompt": "What is it ?", "max_tokens": 4}
        wrong = {"vllm_xargs": {"kv_compaction_ratio": "0"}, "stream": bool(number % 2)}
        refused = call(server, "POST", "/v1/completions", **body, **wrong)
        assert refused.status_code == 400 and "kv_compaction_ratio" in refused.text
        assert call(server, "POST", "/v1/completions", **body).status_code == 200


def test_a_file_of_another_model_stops_the_start(server, tiny_model):
    """Before anything is loaded, and by name."""
    made = call(server, "POST", PREFIXES, name="other", prompt=DOCUMENT)
    assert made.status_code == 200, made.text
    out = call(server, "POST", f"{PREFIXES}/other/save").json()["file"]
    call(server, "DELETE", f"{PREFIXES}/other")
    command = [
        COMMANDS / "vllm",
        "serve",
        str(tiny_model),
        *FLAGS,
        "--kv-compaction-preload",
        out,
    ]
    refused = subprocess.run(
        command,
        env={**environment_of_servers(), **ENVIRONMENT},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert refused.returncode != 0
    assert "--kv-compaction-preload" in refused.stderr + refused.stdout
    assert "model_digest: it was made with" in refused.stderr + refused.stdout
