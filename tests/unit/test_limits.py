"""Numbers that scheduler, workers and startup checks must agree on."""

from __future__ import annotations

import pytest

from vllm_am.config import CompactionConfig, Threshold


@pytest.fixture
def limits(plugin):
    from vllm_am.engine.limits import EngineLimits

    def build(**options):
        return EngineLimits(
            config=CompactionConfig.from_dict(options),
            threshold=Threshold(tokens=4096),
            block_size=16,
            max_model_len=32768,
            num_layers=36,
            queries_per_kv=4,
            in_flight_tokens=8192,
        )

    return build


@pytest.mark.parametrize(
    ("ratio", "tokens", "positions"),
    [
        (0.1, 32768, 2048),  # capped by reference_queries / group
        (0.02, 32768, 8 * 0.02 * 32768 / 4),  # queries_per_slot for each kept slot
        (0.02, 2000, 512),  # at least so many
        (0.1, 300, 300),  # all there are
    ],
)
def test_sample_rate(limits, ratio, tokens, positions):
    assert limits().sample_rate(ratio, tokens) * tokens == pytest.approx(positions)


@pytest.mark.parametrize("share", [0.0, 1 / 32, 0.5], ids=str)
@pytest.mark.parametrize("available", [2**30, 2**36], ids=["1GiB", "64GiB"])
def test_kv_bias_and_queries_fit_in_the_memory_given(limits, available, share):
    """Qwen3-4B's geometry in bf16: what vLLM would have used is not exceeded, and nearly used."""
    built = limits(query_pool_share=share)
    layers, kv_heads, dim, element = 36, 8, 128, 2
    per_token = layers * kv_heads * 2 * dim * element
    kv = built.kv_bytes(available, per_token, 4 / (2 * dim * element))
    blocks = kv // (per_token * 16)
    bias = blocks * 16 * layers * kv_heads * 4
    queries = built.query_pool_positions(blocks) * layers * kv_heads * 4 * dim * element
    used = blocks * 16 * per_token + bias + queries
    assert 0 < used <= available
    assert used > 0.99 * available - 16 * per_token


def test_no_memory_left_is_negative_and_refused_by_vllm(limits):
    """A budget smaller than one sequence's queries cannot hold any KV."""
    assert limits().kv_bytes(2**28, 36 * 8 * 2 * 128 * 2, 0.01) < 0


def test_protected_prefix_is_whole_blocks(limits):
    assert limits(protected_tokens=0).protected_tokens == 0
    assert limits(protected_tokens=4).protected_tokens == 16
    assert limits(protected_tokens=17).protected_tokens == 32


def test_step_work_bound(limits):
    assert limits(layer_tokens_per_step=36 * 1000).step_tokens == 1000
    assert limits(layer_tokens_per_step=1).step_tokens == 16, "one block at least"
