"""The command line, for real: ``vllm serve`` with the plugin, through HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.serving import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FLAGS = [
    *("--kv-compaction", "attention-matching"),
    *("--kv-compaction-ratio", "10x"),
    *("--kv-compaction-threshold", "512"),
    *("--kv-compaction-config", '{"recent_tokens": 32, "step_ms": 1000}'),
    *("--max-model-len", "4096"),
    *("--num-gpu-blocks-override", "129"),
    *("--block-size", "32"),
    *("--dtype", "float32"),
    *("--served-model-name", "tiny"),
    "--enforce-eager",
    "--enable-prompt-tokens-details",
]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    """A served tiny model; the driver's variable for in-process engines must not reach it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        environment.delenv("VLLM_LOGGING_LEVEL", raising=False)
        with Server(str(tiny_model), FLAGS, log, ENVIRONMENT) as running:
            environment.undo()  # the server has its environment; other tests need theirs
            running.wait_until_ready()
            yield running


@pytest.fixture(scope="module")
def server_with_its_worker_inside(tiny_model, tmp_path_factory):
    """The worker is in the engine's process, as with a single GPU."""
    log = tmp_path_factory.mktemp("server-inside") / "log"
    environment = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with Server(str(tiny_model), FLAGS, log, environment) as running:
        running.wait_until_ready()
        yield running


def _complete(server, length, **body):
    prompt = [5 + (7 * i * i + length) % 490 for i in range(length)]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, **body}
    return httpx.post(
        f"http://127.0.0.1:{server.port}/v1/completions",
        json={"ignore_eos": True, **body},
        timeout=120,
    )


def test_compacts_with_the_worker_in_the_engines_process(server_with_its_worker_inside):
    """vLLM changes the configuration's ``instance_id`` once such an engine is up."""
    server = server_with_its_worker_inside
    before = server.metrics()
    assert _complete(server, 900).status_code == 200
    delta = server.metrics().since(before)
    assert delta.total("vllm:kv_compaction_compactions_total") == 1
    assert delta.total("vllm:kv_compaction_failures_total") == 0


def test_startup_line_says_what_is_on(server):
    (line,) = server.log_lines("KV compaction is on")
    assert "attention matching (highest-attention)" in line
    assert "keeps 0.1 of the KV (10.0x), threshold 512 tokens, queries context-rotated, " in line
    assert "3 layers x 2 KV heads" in line
    assert "last 32 and first 32 tokens stay exact" in line


def test_compaction_through_http_with_its_proof(server):
    """Completes, one INFO line, and the metrics agree with it."""
    before = server.metrics()
    reply = _complete(server, 1500)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] == 12
    delta = server.metrics().since(before)
    span = (1500 - 32) // 32 * 32 - 32
    slots = -(-span // 320) * 32  # a tenth, in whole blocks
    assert delta.total("vllm:kv_compaction_compactions_total") == 1
    assert delta.total("vllm:kv_compaction_tokens_total") == span
    assert delta.total("vllm:kv_compaction_slots_total") == slots
    freed = span // 32 - -(-slots // 32)
    assert delta.total("vllm:kv_compaction_blocks_freed_total") == freed
    assert delta.total("vllm:kv_compaction_seconds_count") == 1
    assert 0 < delta.mean("vllm:kv_compaction_output_error") < 2
    assert 0 < delta.mean("vllm:kv_compaction_mass_error") < 2
    line = server.log_lines("KV compaction: request")[-1]
    assert re.search(
        rf"tokens \[32, {32 + span}\): {span} tokens -> {slots} slots per head "
        rf"\({span / slots:.1f}x\), "
        rf"{span // 32} -> {-(-slots // 32)} blocks \({freed} freed\), \d+ ms, "
        r"held-out error: output [\d.]+, mass [\d.]+",
        line,
    )


def test_metrics_exist_from_the_start(server):
    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    for reason in ("non-finite", "no-queries", "singular", "no-mass", "out-of-memory"):
        assert re.search(rf'vllm:kv_compaction_failures_total{{.*reason="{reason}".*}} 0\.0', text)


def test_streaming(server):
    reply = _complete(server, 900, stream=True)
    chunks = [line for line in reply.text.splitlines() if line.startswith("data: {")]
    assert len(chunks) >= 12
    assert reply.text.strip().endswith("data: [DONE]")


def test_request_options(server):
    before = server.metrics()
    assert _complete(server, 1200, vllm_xargs={"kv_compaction": "off"}).status_code == 200
    assert server.metrics().since(before).total("vllm:kv_compaction_compactions_total") == 0
    assert _complete(server, 1210, vllm_xargs={"kv_compaction_ratio": "2x"}).status_code == 200
    delta = server.metrics().since(before)
    tokens = delta.total("vllm:kv_compaction_tokens_total")
    assert delta.total("vllm:kv_compaction_slots_total") == -(-tokens // 64) * 32 > 0
    assert _complete(server, 1220, vllm_xargs={"kv_compaction_threshold": 3000}).status_code == 200
    assert server.metrics().since(before).total("vllm:kv_compaction_compactions_total") == 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kv_compaction": "maybe"}, "kv_compaction"),
        ({"kv_compaction_ratio": 1.5}, "kv_compaction_ratio"),
        ({"kv_compaction_threshold": "80%"}, "kv_compaction_threshold"),
        ({"kv_compaction_treshold": 5}, "kv_compaction_treshold"),
    ],
    ids=lambda v: str(v),
)
def test_invalid_option_is_a_400_that_names_the_field(server, options, field):
    reply = _complete(server, 20, vllm_xargs=options)
    assert reply.status_code == 400
    assert field in reply.json()["error"]["message"]
    assert _complete(server, 20).status_code == 200


def test_museum_15_next_turn_hits_the_exact_prefix(server):
    """After compaction the server does not forget: the next turn finds the prefix cached."""
    first = _complete(server, 1400, max_tokens=40, return_token_ids=True).json()
    history = [5 + (7 * i * i + 1400) % 490 for i in range(1400)]
    history += first["choices"][0]["token_ids"]
    reply = _complete(server, 0, prompt=[*history, 77, 78, 79]).json()
    cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 1400 // 32 * 32


def _serve(tiny_model, *flags):
    """Run ``vllm serve`` with flags that it must refuse; its output."""
    vllm = Path(sys.executable).parent / "vllm"
    result = subprocess.run(
        [str(vllm), "serve", str(tiny_model), "--enforce-eager", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env={k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"},
    )
    assert result.returncode != 0
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-compaction-ratio", "0.1"], "add it"),
        (["--kv-compaction", "attention-matching", "--kv-compaction-ratio", "7"], "that is KEPT"),
        (
            [
                *("--kv-compaction", "attention-matching"),
                *("--kv-compaction-threshold", "5000", "--max-model-len", "4096"),
            ],
            "no sequence would ever be compacted",
        ),
    ],
    ids=["companion-alone", "ratio", "threshold"],
)
def test_bad_flags_are_refused_with_a_hint(tiny_model, flags, message):
    output = _serve(tiny_model, *flags)
    assert message in output
    assert "--kv-compaction" in output


def test_help_has_a_group_of_its_own():
    vllm = Path(sys.executable).parent / "vllm"
    text = subprocess.run(
        [str(vllm), "serve", "--help=kv-compaction"], capture_output=True, text=True, timeout=300
    ).stdout
    assert all(f"--kv-compaction{s}" in text for s in ("", "-ratio", "-threshold", "-config"))
    assert json.loads('{"recent_tokens": 128}')  # the example in the help is valid JSON
    assert "recent_tokens" in text and "KEPT" in text
