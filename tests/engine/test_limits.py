"""Numbers that scheduler, workers and startup checks must agree on."""

from __future__ import annotations

import pytest

from vllm_am.config import CompactionConfig, CompactionConfigError, Threshold


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
            kv_heads=8,
            queries_per_kv=4,
            head_size=128,
            in_flight_tokens=8192,
        )

    return build


@pytest.mark.parametrize(
    ("tokens", "positions"), [(32768, 2048), (2048, 2048), (300, 300)], ids=str
)
def test_sample_rate_takes_all_up_to_the_limit(limits, tokens, positions):
    """reference_queries = 8192 vectors, four from each position."""
    assert limits().sample_rate(tokens) * tokens == pytest.approx(positions)


@pytest.mark.parametrize(
    ("tokens", "slots", "heads"),
    [(16384, 819, 24), (16384, 8192, 8), (2000, 100, 18 * 8), (100, 5, 36 * 8)],
)
def test_heads_at_once_are_bounded_by_tokens_and_slots(limits, tokens, slots, heads):
    assert limits().heads_at_once(tokens, slots) == heads


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


def test_the_query_pool_holds_two_sequences_where_that_is_little(limits):
    """2,048 positions and the 64 at its end are one; a share of 1/32 of the KV pool's is more from
    132k tokens on."""
    positions = {
        tokens: limits().query_pool_positions(tokens // 16)
        for tokens in (1024, 8192, 24576, 65536, 262144)
    }
    assert positions == {1024: 1024, 8192: 2112, 24576: 3072, 65536: 4224, 262144: 8192}


def test_no_memory_left_is_negative_and_refused_by_vllm(limits):
    """A budget smaller than one sequence's queries cannot hold any KV."""
    assert limits().kv_bytes(2**28, 36 * 8 * 2 * 128 * 2, 0.01) < 0


def test_protected_prefix_is_whole_blocks(limits):
    assert limits(protected_tokens=0).protected_tokens == 0
    assert limits(protected_tokens=4).protected_tokens == 16
    assert limits(protected_tokens=17).protected_tokens == 32


#: Options, and the option that the refusal names. Sequences of up to 2,048 tokens, blocks of 16.
USELESS = {
    "recent": ({"recent_tokens": 2030}, "--kv-compaction-config recent_tokens=2030", "lower it"),
    "protected": ({"protected_tokens": 2000}, "config protected_tokens=2000", "lower it"),
    "long-span": (
        {"threshold": "50%", "min_span_tokens": 2000},
        "config min_span_tokens=2000",
        "lower it",
    ),
    "short-span": (
        {"min_span_tokens": 16, "max_span_tokens": 16},
        "config max_span_tokens=16",
        "raise it",
    ),
    "ratio": ({"ratio": 0.995}, "--kv-compaction-ratio=0.995", "lower it"),
}


@pytest.mark.parametrize("case", USELESS.values(), ids=USELESS.keys())
def test_options_by_which_nothing_is_ever_compacted(engine_config, case):
    """Refused at startup: served silently they would be no compaction at all."""
    options, named, fix = case
    with pytest.raises(CompactionConfigError, match="could ever be compacted") as error:
        engine_config(options)
    assert named in str(error.value) and str(error.value).endswith(fix)
