"""The tensor back end: the model over compacted caches, query sources, budgets, options."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality.conversations import Mode, grade, make_conversations
from benchmarks.quality.forward import Prefix, empty_prefix, extend, generate
from benchmarks.quality.query_sources import SOURCES
from benchmarks.quality.tensor_backend import (
    Reading,
    TensorOptions,
    divide_pages,
    full_cache,
    load_model,
    run,
)

TOKENS, BLOCK = 500, 16
BASE = {"method": "highest-attention", "budgets": "uniform", "queries": "repeat-prefill"}


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def reading(model):
    (conversation,) = make_conversations(0, TOKENS, "sparse", Mode.AFTER, 3, 2, 1)
    return Reading(model, conversation, 0, TOKENS, "sparse")


def _run(reading, ratio, **options):
    return run(reading, TensorOptions.from_dict(ratio, {**BASE, **options}), BLOCK)


def test_reading_on_equals_the_model_itself(model):
    ids = torch.randint(4, 800, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
    first = extend(model, empty_prefix(model), ids[:, :25])
    second = extend(model, empty_prefix(model), ids[:, 25:], first)
    assert torch.allclose(torch.cat((first.hidden, second.hidden), dim=1), expected, atol=1e-4)
    assert second.keys.shape == (8, 2, 40, 64)


def test_a_hidden_slot_of_a_prefix_changes_nothing(model, reading):
    prefix = reading.prefix
    pad = torch.full((8, 3, 64), 7.0)
    padded = Prefix(
        torch.cat((pad, prefix.keys), dim=1),
        torch.cat((pad, prefix.values), dim=1),
        torch.cat((torch.full((8, 3), -torch.inf), prefix.bias), dim=1),
        prefix.length,
    )
    suffix = torch.tensor([reading.conversation.suffix])
    assert torch.allclose(
        extend(model, padded, suffix).hidden, reading.continuation.hidden, atol=1e-5
    )


def test_generation_stops_at_the_end_and_follows_the_model(model, reading):
    starts = torch.tensor([reading.conversation.suffix[:8]] * 2)
    first, second = generate(model, reading.prefix, starts, end=-1, limit=5)
    assert first == second and len(first) == 5
    whole = extend(model, reading.prefix, torch.tensor([[*starts[0].tolist(), *first]]))
    with torch.no_grad():
        greedy = model.logits(whole.hidden[0, 7:12]).argmax(-1).tolist()
    assert greedy == first
    assert generate(model, reading.prefix, starts, end=first[1], limit=5)[0] == first[:2]


def test_keeping_everything_is_the_full_cache(reading):
    full, kept = full_cache(reading, BLOCK), _run(reading, 1.0)
    assert kept.blocks == kept.full_blocks == full.blocks
    assert kept.output_error == kept.mass_error == 0
    assert kept.score.log_probs == pytest.approx(full.score.log_probs, abs=1e-4)


def test_memory_is_counted_in_whole_blocks_as_in_the_planner(reading):
    outcome = _run(reading, 0.1)
    tokens = reading.prefix.length
    end = (tokens - 64) // BLOCK * BLOCK
    assert outcome.span_full_blocks == (end - BLOCK) // BLOCK
    assert outcome.span_blocks == math.ceil(math.ceil((end - BLOCK) * 0.1) / BLOCK)
    exact = math.ceil(tokens / BLOCK) - outcome.span_full_blocks
    assert outcome.blocks == exact + outcome.span_blocks
    assert outcome.full_blocks == math.ceil(tokens / BLOCK)


def test_a_fit_beats_random_keys(reading):
    conversations = [reading.conversation]
    fitted = grade(conversations, [_run(reading, 0.2).score])
    random = grade(conversations, [_run(reading, 0.2, method="random").score])
    assert fitted.nll < random.nll
    assert fitted.counts["recall"].right >= random.counts["recall"].right


@pytest.mark.parametrize(
    "option",
    [
        {"method": "evict-max"},
        {"budgets": "global"},
        {"budgets": {f"L{i}H{j}": i + 1 for i in range(4) for j in range(2)}},
        {"queries": "context-prefill"},
        {"queries": {"repeat-prefill": 0.5, "random": 0.5}},
        {"reference_queries": 100},
        {"recent_tokens": 128},
        {"protected_tokens": 40},
    ],
    ids=str,
)
def test_every_option_changes_something(reading, option):
    assert _run(reading, 0.2, **option).score != _run(reading, 0.2).score


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="step_ms"):
        TensorOptions.from_dict(0.1, {"step_ms": 1})
    with pytest.raises(ValueError, match="budgets"):
        TensorOptions.from_dict(0.1, {"budgets": "nonsense"})


@pytest.mark.parametrize("budgets", ["uniform", "global", {"L1H0": 3.0, "L2H1": 1.0}])
def test_budgets_hand_out_exactly_the_pages_there_are(budgets):
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(8, 320, 64, generator=generator) for _ in range(3))
    pages = divide_pages(budgets, keys, values, queries, 0.125, 4, BLOCK, 2)
    assert int(pages.sum()) == 4 * 8
    if isinstance(budgets, dict):
        # Heads that a file leaves out have the mean share, as in the engine.
        assert int(pages[2]) == int(pages.max()) > int(pages[0]) > int(pages[5])


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_sources_give_queries_of_every_head(reading, source, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.query_sources.CONVERSATIONS", 4)
    queries = reading.sources.get(source, 10_000)
    assert queries.shape[0] == 8 and queries.shape[2] == 64
    assert queries.shape[1] >= 2 * 20 and queries.shape[1] % 2 == 0
    assert bool(queries.isfinite().all())
    assert reading.sources.get(source, 30).shape[1] == 30


def test_mixtures_keep_their_fractions(reading):
    length = reading.prefix.length
    mixed = reading.sources.get({"context-prefill": 0.75, "random": 0.25}, 400)
    assert mixed.shape[1] == 400
    context = reading.sources.get("context-prefill", 300)
    assert torch.equal(mixed.view(8, 2, 200, 64)[:, :, :150], context.view(8, 2, 150, 64))
    # 0.9 of 100,000 is more than there is: all scale down.
    scaled = reading.sources.get({"context-prefill": 0.9, "random": 0.1}, 100_000)
    assert scaled.shape[1] == 2 * (length + int(length / 0.9 * 0.1))
    for wrong in ({"random": 0.5}, {"random": 1.5, "prompts": -0.5}, {"nobody": 1.0}):
        with pytest.raises(ValueError, match="queries"):
            reading.sources.get(wrong, 400)


def test_rotated_queries_are_those_of_reading_the_text_again(reading):
    """Exactly so in layer 0, whose queries know nothing but their token and position."""
    rotated = reading.sources.get("context-rotated", 10_000)
    again = reading.sources.get("repeat-prefill", 10_000)
    assert torch.allclose(rotated[:2], again[:2], atol=1e-3)
    assert not torch.allclose(rotated[2:], again[2:], atol=1e-3)
