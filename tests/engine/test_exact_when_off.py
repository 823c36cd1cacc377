"""``"kv_compaction": "off"`` means exact, whatever the engine has served before."""

from __future__ import annotations

import random

import pytest

from tests.engine import driver
from tests.engine.driver import BLOCK, Ask, random_prompt

pytestmark = pytest.mark.engine

OFF = {"kv_compaction": "off"}
OPTIONS = {"ratio": 0.1, "threshold": 160, "recent_tokens": 16}


def _logged(engine, prompt, name):
    engine.logprobs = 3
    engine.run([Ask(prompt, 16, OFF)], names=name)
    engine.logprobs = None
    return engine.outputs[f"{name}0"], engine.likely[f"{name}0"]


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
def test_museum_23_off_equals_a_cold_engine(tiny_model, force_async, cache):
    """A conversation whose answers were computed over its compacted beginning: its last prompt,
    which was not, is found in the cache, and the answer behind it is not."""
    rng = random.Random(3)
    prompt = random_prompt(rng, 700)
    history = prompt
    options = {**OPTIONS, "cache": cache}
    with driver.start(tiny_model, options, force_async, max_num_batched_tokens=512) as engine:
        for turn in range(3):
            if turn == 0 or cache == "off":  # else it begins on a compacted prefix
                exact = len(history)
            engine.run([Ask(history, 150)], names=f"turn-{turn}-")
            history = (*history, *engine.outputs[f"turn-{turn}-0"], *random_prompt(rng, 40))
        assert engine.totals.compactions >= 3
        warm = _logged(engine, history, "warm-")
        cached = engine.cached_tokens["warm-0"]
        assert cached <= exact + BLOCK
        if cache == "off":  # else the exact blocks of what is compacted were the first to go
            assert exact // BLOCK * BLOCK <= cached
    with driver.start(tiny_model, options, force_async, max_num_batched_tokens=512) as engine:
        cold = _logged(engine, history, "cold-")
    assert warm[0] == cold[0]
    for found, expected in zip(warm[1], cold[1], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_chunks_that_were_read_over_compacted_ones(tiny_model):
    """A prompt that the pool cannot hold is compacted as it goes: its first chunks are exact."""
    prompt = random_prompt(random.Random(4), 3000)
    small = {"num_gpu_blocks_override": 49, "max_model_len": 3200, "max_num_batched_tokens": 96}
    ends = set()

    def watch(engine, step):
        filed = [block for block in engine.pool.blocks if block.block_hash is not None]
        ends.update(block._block_hash_num_tokens for block in filed)

    options = {"ratio": 0.1, "threshold": 320, "cache": "off"}
    with driver.start(tiny_model, options, **small) as engine:
        engine.before_step = watch
        engine.run([Ask(prompt, 4)])
        assert engine.totals.compactions >= 5
    assert 320 <= max(ends) < 48 * BLOCK, "the pool holds no more of it exactly"
