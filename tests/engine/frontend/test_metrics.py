"""Compaction counters, as Prometheus sees them."""

from __future__ import annotations

from types import SimpleNamespace

import prometheus_client
import pytest

from vllm_am.config import CONFIG_KEY

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def metrics(plugin):
    from vllm_am.engine.frontend import metrics

    return metrics


@pytest.fixture
def registry(monkeypatch):
    """A registry of its own, so that nothing of this process's is counted or left behind."""
    registry = prometheus_client.CollectorRegistry()
    for name in ("Counter", "Gauge", "Histogram"):
        bound = getattr(prometheus_client, name)
        monkeypatch.setattr(
            prometheus_client,
            name,
            lambda *args, bound=bound, **kwargs: bound(*args, registry=registry, **kwargs),
        )
    return registry


def config(additional_config=None, rope=None):
    return SimpleNamespace(
        additional_config={CONFIG_KEY: {}} if additional_config is None else additional_config,
        model_config=SimpleNamespace(
            served_model_name="tiny",
            hf_text_config=SimpleNamespace(rope_parameters=rope, num_hidden_layers=2),
        ),
    )


def one(metrics, tokens=1000, failures=None):
    stats = metrics.CompactionStats.one(
        tokens=tokens,
        slots=tokens // 10,
        blocks_freed=56,
        seconds=0.3,
        output_error=0.04,
        mass_error=0.02,
    )
    stats.failures = failures or {}
    return stats


COUNTERS = ["compactions", "merges", "tokens", "slots", "blocks_freed"]
HISTOGRAMS = ["seconds", "step_seconds", "output_error", "mass_error"]


def value(registry, name, engine=0, **labels):
    labels |= {"model_name": "tiny", "engine": str(engine)}
    return registry.get_sample_value(f"vllm:kv_compaction_{name}", labels)


def test_every_series_exists_from_the_start(metrics, registry):
    metrics.CompactionMetrics(config(), [0, 1])
    for engine in (0, 1):
        for name in COUNTERS:
            assert value(registry, f"{name}_total", engine) == 0
        for name in HISTOGRAMS:
            assert value(registry, f"{name}_count", engine) == 0


def test_what_is_held_is_what_the_last_report_says(metrics, registry):
    series = metrics.CompactionMetrics(config(), [0])
    for now in (
        metrics.Holdings(2, 1, 64, 4, 0.25, 3, 5, 1, 7),
        metrics.Holdings(1, 0, 32, 1, 0.125, 2, 0, 4, 6),
    ):
        series.record(metrics.CompactionStats(now=now), 0)
    held = [value(registry, name) for name, _ in metrics._GAUGES.values()]
    assert held == [1, 0, 32, 1, 0.125, 2, 0, 4, 6]
    series.record(one(metrics), 0)
    assert value(registry, "sequences") == 1, "a report that says nothing new"


def test_options_are_a_metric(metrics, registry):
    metrics.CompactionMetrics(config({CONFIG_KEY: {"ratio": "20x", "budgets": "uniform"}}), [0])
    (family,) = [f for f in registry.collect() if f.name == "vllm:kv_compaction_info"]
    (sample,) = family.samples
    assert sample.value == 1 and sample.labels["ratio"] == "0.05"
    assert sample.labels["budgets"] == "uniform" and sample.labels["method"] == "highest-attention"


@pytest.mark.parametrize(
    ("rope", "queries"),
    [({"rope_type": "default"}, "context-rotated"), (None, "context-prefill")],
    ids=["rotates", "does-not"],
)
def test_the_queries_in_effect_are_a_label(metrics, registry, rope, queries):
    metrics.CompactionMetrics(config(rope=rope), [0])
    (family,) = [f for f in registry.collect() if f.name == "vllm:kv_compaction_info"]
    assert family.samples[0].labels["queries"] == queries


def test_reports_are_counted_by_engine(metrics, registry):
    series = metrics.CompactionMetrics(config(), [0, 1])
    series.record(one(metrics, 1000, {"singular": 2}), engine=1)
    series.record(one(metrics, 500), engine=1)
    series.record(metrics.CompactionStats(merges=3), engine=1)
    steps = metrics.CompactionStats(step_seconds=[0.04, 0.02], pressed_steps=1)
    assert steps
    series.record(steps, engine=1)
    assert value(registry, "pressed_steps_total", 1) == 1
    assert value(registry, "step_seconds_bucket", 1, le="0.03") == 1
    cache = {"cache_queries": 3, "cache_hits": 2, "cache_hit_tokens": 640}
    series.record(metrics.CompactionStats(**cache), engine=1)
    for name, count in cache.items():
        assert value(registry, f"{name}_total", 1) == count
    got = {name: value(registry, f"{name}_total", 1) for name in COUNTERS}
    assert got == {
        "compactions": 2,
        "merges": 3,
        "tokens": 1500,
        "slots": 150,
        "blocks_freed": 112,
    }
    sums = {name: value(registry, f"{name}_sum", 1) for name in HISTOGRAMS}
    assert sums == pytest.approx(
        {"seconds": 0.6, "step_seconds": 0.06, "output_error": 0.08, "mass_error": 0.04}
    )
    assert value(registry, "seconds_bucket", 1, le="0.25") == 0
    assert value(registry, "seconds_bucket", 1, le="0.5") == 2
    assert value(registry, "failures_total", 1, reason="singular") == 2
    assert all(value(registry, f"{name}_total", 0) == 0 for name in COUNTERS)


# -- the wrapped stat loggers ---------------------------------------------------------------------


@pytest.fixture
def manager(metrics, registry, wrap):
    """A StatLoggerManager whose vLLM part only notes down what it is given."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    def stock_init(self, vllm_config, engine_idxs=None):
        assert not list(registry.collect())  # ours come after: vLLM unregisters "vllm:" metrics
        self.engine_indexes = engine_idxs or [0]
        self.seen = []

    def stock_record(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx):
        carried = scheduler_stats and scheduler_stats.kv_connector_stats
        self.seen.append((carried, iteration_stats, mm_cache_stats, engine_idx))

    wrap(metrics.install, StatLoggerManager, __init__=stock_init, record=stock_record)
    return StatLoggerManager


def test_record_counts_and_strips_the_entry(metrics, registry, manager):
    loggers = manager(config(), [0, 1])
    assert value(registry, "compactions_total", 1) == 0
    carrier = SimpleNamespace(kv_connector_stats={"connector": 1})
    one(metrics).attach(carrier)
    loggers.record(carrier, "iteration", mm_cache_stats="mm", engine_idx=1)
    assert loggers.seen == [({"connector": 1}, "iteration", "mm", 1)]
    assert value(registry, "tokens_total", 1) == 1000


def test_record_without_our_entry_passes_through(registry, manager):
    loggers = manager(config())
    loggers.record(None, "iteration")
    loggers.record(SimpleNamespace(kv_connector_stats=None), "iteration")
    assert loggers.seen == [(None, "iteration", None, None)] * 2
    assert value(registry, "compactions_total") == 0


def test_engine_without_compaction_has_no_series(metrics, registry, manager):
    """Another engine of this process may have it."""
    loggers = manager(config({"mine": 1}))
    assert not list(registry.collect())
    carrier = SimpleNamespace(kv_connector_stats={"connector": 1})
    loggers.record(carrier, "iteration")
    assert loggers.seen == [({"connector": 1}, "iteration", None, None)]
