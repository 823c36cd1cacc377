"""``vllm-am plan`` says what an engine then has: blocks of the pool, blocks of a sequence."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks.gpu_suite.models import QWEN3_4B
from tests.engine import driver
from vllm_am.cli import app
from vllm_am.config import CompactionConfigError
from vllm_am.plan import PlanError, Shape, make_plan, parse_size

pytestmark = pytest.mark.engine


def plan_for(model, context, block_size, available=1 << 30, in_flight=2048, **options):
    shape = Shape.of(AutoConfig.from_pretrained(model), 1, 4)
    return make_plan(
        shape,
        available,
        context=context,
        itemsize=4,
        block_size=block_size,
        options=options,
        in_flight_tokens=in_flight,
    )


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("options", [{"threshold": 900}, {"query_pool_share": 0.5, "ratio": 0.5}])
def test_blocks_of_the_pool(tiny_model, monkeypatch, block_size, options):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    settings = {"num_gpu_blocks_override": None, "block_size": block_size}
    plan = plan_for(tiny_model, 2048, block_size, **options)
    with driver.start(tiny_model, options, **settings) as engine:
        assert engine.pool.num_gpu_blocks == plan.pool
        assert engine.scheduler.compaction.limits.peak_tokens == plan.limits.peak_tokens
    with driver.start(tiny_model, None, **settings) as engine:
        assert engine.pool.num_gpu_blocks == plan.exact_pool


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (900, {"threshold": 300, "ratio": 0.25, "recent_tokens": 16}),
        (1900, {"threshold": 300, "ratio": 0.1, "recent_tokens": 32}),
        (1900, {"threshold": 300, "ratio": 0.1, "max_span_tokens": 640, "protected_tokens": 40}),
        (100, {"threshold": 300}),
    ],
    ids=["quarter", "tenth", "several-spans", "below"],
)
def test_blocks_of_a_sequence(tiny_model, prompt, options):
    """When it has been compacted, and while it grows, before it is due once more."""
    plan = plan_for(tiny_model, 2048, 32, **options)
    seen = {}

    def observe(engine, step):
        for request in engine.scheduler.running:
            seen[request.num_computed_tokens - prompt] = engine.used_blocks

    with driver.start(tiny_model, options) as engine:
        engine.before_step = observe
        engine.run([driver.Ask(driver.random_prompt(random.Random(3), prompt), max_tokens=100)])
    settled = {generated: used for generated, used in seen.items() if generated > 60}
    assert settled == {n: plan.held_blocks(prompt, n) for n in settled} and len(settled) > 30


def test_the_gentlest_ratio_for_a_number_of_contexts(tiny_model):
    plan = plan_for(tiny_model, 2048, 32, threshold=400)
    exact = plan.sequences[0]
    assert plan.ratio_for(exact) == 1
    ratio = plan.ratio_for(2 * exact)
    assert ratio is not None and plan.with_ratio(ratio).sequences[1] >= 2 * exact
    gentler = plan.with_ratio(0.5).sequences[1]
    assert ratio == 0.5 if gentler >= 2 * exact else gentler < 2 * exact
    assert plan.ratio_for(1000 * exact) is None


def test_a_share_of_the_pool_compacts_all_that_can_be(tiny_model):
    plan = plan_for(tiny_model, 2048, 32, threshold="50%", ratio=0.1)
    # The protected block, a tenth of what is behind it, and the newest tokens.
    recent = plan.limits.config.recent_tokens
    end = (1900 - recent) // 32 * 32
    assert plan.held_blocks(1900) == 1 + -(-(end - 32) // 320) + -(-(1900 - end) // 32)


def test_weights_are_counted(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    count = sum(parameter.numel() for parameter in model.parameters())
    shape = Shape.of(AutoConfig.from_pretrained(tiny_model), 1, 2)
    assert shape.weight_bytes == 2 * count


def test_tensor_parallel_ranks_share_heads(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)  # 8 heads on 2 KV heads
    one, two, four = (Shape.of(config, ranks, 2) for ranks in (1, 2, 4))
    assert [shape.kv_heads for shape in (one, two, four)] == [2, 1, 1]
    assert [shape.queries_per_kv for shape in (one, two, four)] == [4, 4, 2]
    with pytest.raises(PlanError, match="--tp 3"):
        Shape.of(config, 3, 2)


@pytest.mark.parametrize("kind", ["hybrid", "linear_attention", "sliding_attention"])
def test_layers_that_hold_something_else_are_not_planned(kind):
    text = SimpleNamespace(num_hidden_layers=2, layer_types=["full_attention", kind])
    text.sliding_window = 64
    with pytest.raises(PlanError, match="not planned yet"):
        Shape.of(SimpleNamespace(get_text_config=lambda: text), 1, 2)


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("128k", "", 131072),
        ("4096", "", 4096),
        ("80GB", "b?", 80 << 30),
        ("1.5 GiB", "b?", 3 << 29),
    ],
)
def test_sizes(text, unit, size):
    assert parse_size(text, unit) == size


@pytest.mark.parametrize("text", ["", "k", "12q", "-4k", "1..5k"])
def test_what_is_no_size(text):
    with pytest.raises(PlanError, match="expected a size"):
        parse_size(text)


def test_nothing_to_compact_is_refused(tiny_model):
    with pytest.raises(CompactionConfigError, match="recent_tokens"):
        plan_for(tiny_model, 2048, 32, recent_tokens=2040)


def test_the_command(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    ask = ["plan", str(tmp_path), "--context", "32k", "--memory"]
    result = CliRunner().invoke(app, [*ask, "80GB"])
    assert result.exit_code == 0, result.output
    assert "32,768 tokens, blocks of 16" in result.output and "2,048" in result.output
    for count, says in (
        (2, "without compaction"),
        (60, "--kv-compaction-ratio"),
        (9999, "no ratio"),
    ):
        result = CliRunner().invoke(app, [*ask, "80GB", "--sequences", str(count)])
        assert f"{count:,} at once: " in result.output and says in result.output
    for memory, says in (("8GB", "weights alone"), ("plenty", "expected a size")):
        result = CliRunner().invoke(app, [*ask, memory])
        assert result.exit_code == 2 and says in " ".join(result.output.split())
