"""Front ends without a server: ``AsyncLLM`` and ``vllm run-batch``."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fresh_process import environment
from tests.engine.driver import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = str(ROOT / "benchmarks" / "recall" / "model")
PROMPT = [5 + 7 * i * i % 300 for i in range(900)]
OPTIONS = {"ratio": "10x", "threshold": 512, "recent_tokens": 32, "step_ms": 1000}
WRONG = {"kv_compaction_ratio": "0"}


def test_async_llm(monkeypatch):
    """A wrong option is the caller's error, as vLLM's own are; what is right is counted."""
    from prometheus_client import REGISTRY
    from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    arguments: dict[str, Any] = {
        **{"model": MODEL, "dtype": "float32", "enforce_eager": True, "block_size": 32},
        **{"max_model_len": 2048, "num_gpu_blocks_override": 129, "disable_log_stats": False},
        "additional_config": {"kv_compaction": OPTIONS},
    }

    async def ask(engine: AsyncLLM, name: str, options: dict[str, Any]) -> int:
        params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0, extra_args=options)
        lengths = [
            len(reply.outputs[0].token_ids)
            async for reply in engine.generate(TokensPrompt(prompt_token_ids=PROMPT), params, name)
        ]
        return lengths[-1]

    async def talk() -> float:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        try:
            with pytest.raises(VLLMValidationError, match="kv_compaction_ratio"):
                await ask(engine, "wrong", WRONG)
            assert await ask(engine, "right", {}) == 12
            labels = {"engine": "0", "model_name": MODEL}
            counted = REGISTRY.get_sample_value("vllm:kv_compaction_compactions_total", labels)
            assert counted is not None
            return counted
        finally:
            engine.shutdown()

    assert asyncio.run(talk()) == 1


def test_run_batch(tmp_path):
    """A line with a wrong option is answered with an error, the lines beside it as ever."""
    text = "Judith Richter was born in Porto . " * 120
    messages = [{"role": "user", "content": text}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 12, "ignore_eos": True}
    bodies = {"right": body, "wrong": {**body, "vllm_xargs": WRONG}, "again": body}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        for name, body in bodies.items()
    ]
    Path(tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    command = [str(Path(sys.executable).parent / "vllm"), "run-batch", "--model", MODEL]
    command += ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--enforce-eager"]
    command += ["--kv-compaction", "attention-matching", "--kv-compaction-ratio", "10x"]
    command += ["--kv-compaction-threshold", "512", "--max-model-len", "2048"]
    command += ["--kv-compaction-config", '{"step_ms": 1000}']
    command += ["--block-size", "32", "--dtype", "float32", "--num-gpu-blocks-override", "129"]
    ran = subprocess.run(
        command,
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_LOGGING_LEVEL="INFO"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    replies = {
        reply["custom_id"]: reply
        for reply in map(json.loads, (tmp_path / "out").read_text().splitlines())
    }
    assert "kv_compaction_ratio" in json.dumps(replies["wrong"])
    for name in ("right", "again"):
        assert replies[name]["response"]["body"]["usage"]["completion_tokens"] == 12
    assert "freed)" in ran.stdout + ran.stderr
