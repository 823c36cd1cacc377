"""Prefill chunks of exact sequences by vLLM's own CPU kernel: who takes which rows, and the same
numbers as attention over the pages."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from tests.engine import driver
from tests.engine.models import make_random_model
from vllm_am.compaction.attend_pages import attend_pages, group_rows
from vllm_am.engine.worker import attention_cpu, prefill_cpu
from vllm_am.engine.worker.prefill_cpu import ExactPrefill, ExactPrefillBuilder

pytestmark = pytest.mark.engine


def prompt(seed: int, tokens: int) -> tuple[int, ...]:
    return driver.random_prompt(random.Random(seed), tokens)


@pytest.fixture
def paths(monkeypatch):
    """Rows attended to by vLLM's kernel and in plain torch, one layer's; vLLM's are checked."""
    seen: Counter[str] = Counter()
    built = {}
    build, call, plain = ExactPrefillBuilder._of, ExactPrefill.__call__, attend_pages

    def observed_build(self, rows, kv, common, scratch):
        scratch.fill_(torch.nan)
        prefill = build(self, rows, kv, common, scratch)
        built[id(prefill)] = rows
        return prefill

    def observed_call(self, impl, layer, kv, index, query, out):
        call(self, impl, layer, kv, index, query, out)
        rows = built[id(self)]
        seen["vllm"] += len(rows) * (index == 0)
        for group in group_rows(rows, kv):
            expected = plain(query[group.queries], kv, group, index, scale=impl.scale)
            torch.testing.assert_close(out[group.queries], expected, rtol=1e-4, atol=1e-5)

    def observed_plain(query, kv, rows, index, **keywords):
        seen["torch"] += len(rows.live_tokens) * (index == 0)
        return plain(query, kv, rows, index, **keywords)

    monkeypatch.setattr(ExactPrefillBuilder, "_of", observed_build)
    monkeypatch.setattr(ExactPrefill, "__call__", observed_call)
    monkeypatch.setattr(attention_cpu, "attend_pages", observed_plain)
    return seen


def serve(model, tokens, compaction, **options):
    asks = [driver.Ask(prompt(i, length), max_tokens=4) for i, length in enumerate(tokens)]
    with driver.start(model, compaction, max_num_batched_tokens=256, **options) as engine:
        return engine.run(asks, check=compaction is not None)


@pytest.mark.parametrize("scratch_bytes", [prefill_cpu.SCRATCH_BYTES, 1])
def test_chunks_of_several_sequences(tiny_model, paths, monkeypatch, scratch_bytes):
    """Over several steps, beside each other and beside decoding ones; one by one, too."""
    monkeypatch.setattr(prefill_cpu, "SCRATCH_BYTES", scratch_bytes)
    tokens = [700, 33, 129, 300, 9]
    found = serve(tiny_model, tokens, {"threshold": 1900})
    assert paths["vllm"] >= 8 and not paths["torch"]
    assert found == serve(tiny_model, tokens, None)


def test_compacted_rows_are_not_its(tiny_model, paths):
    """A chunk that is read over a compacted prefix, between chunks of exact sequences."""
    compaction = {"threshold": 200, "ratio": 0.25, "recent_tokens": 32, "min_span_tokens": 64}
    serve(tiny_model, [1500, 1900, 150], compaction, num_gpu_blocks_override=65)
    assert paths["vllm"] and paths["torch"]


def test_head_sizes_that_its_kernel_does_not_know(tmp_path, paths):
    """Stock vLLM serves no such model on a CPU."""
    model = make_random_model(tmp_path, head_dim=16)
    serve(model, [100], {"threshold": 1900})
    assert paths["torch"] and not paths["vllm"]
