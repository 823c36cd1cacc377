"""What the scheduler counts, on its way to the front end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def Stats(plugin):
    from vllm_am.engine.stats import CompactionStats

    return CompactionStats


def one(Stats, tokens=1000, failures=None):
    stats = Stats.one(
        tokens=tokens,
        slots=tokens // 10,
        blocks_freed=56,
        seconds=0.3,
        output_error=0.04,
        mass_error=0.02,
    )
    stats.failures = failures or {}
    return stats


def test_stats_add_up(Stats):
    total = Stats()
    assert not total
    total.add(one(Stats, 1000, {"singular": 1}))
    total.add(one(Stats, 500))
    total.add(Stats(failures={"singular": 2, "no-mass": 1}, merges=4))
    assert total == Stats(
        compactions=2,
        tokens=1500,
        slots=150,
        blocks_freed=112,
        seconds=[0.3, 0.3],
        output_errors=[0.04, 0.04],
        mass_errors=[0.02, 0.02],
        failures={"singular": 3, "no-mass": 1},
        merges=4,
    )


def test_what_is_held_is_the_latest(Stats):
    from vllm_am.engine.stats import Holdings

    total = Stats(now=Holdings(sequences=2))
    total.add(Stats(now=Holdings(sequences=1)))
    total.add(one(Stats))
    assert total.now == Holdings(sequences=1)
    carrier = SimpleNamespace(kv_connector_stats=None)
    total.attach(carrier)
    assert Stats.detach(carrier) == total


def test_a_failure_alone_is_worth_reporting(Stats):
    assert Stats(failures={"singular": 1})
    assert Stats(merges=1)
    assert one(Stats)


@pytest.mark.parametrize("others", [None, {}, {"connector": 1}], ids=repr)
def test_detach_undoes_attach(Stats, others):
    carrier = SimpleNamespace(kv_connector_stats=others)
    sent = one(Stats, failures={"no-queries": 1})
    sent.attach(carrier)
    assert set(carrier.kv_connector_stats) == {*(others or {}), "kv_compaction"}
    assert Stats.detach(carrier) == sent
    assert carrier.kv_connector_stats == (others or None)


@pytest.mark.parametrize("others", [None, {"connector": 1}], ids=repr)
def test_detach_leaves_foreign_stats_alone(Stats, others):
    carrier = SimpleNamespace(kv_connector_stats=others)
    assert Stats.detach(carrier) is None
    assert carrier.kv_connector_stats == others
    assert Stats.detach(None) is None


def test_real_scheduler_stats_carry_it(Stats):
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    stats = SchedulerStats()
    one(Stats, failures={"no-mass": 2}).attach(stats)
    received = MsgpackDecoder(SchedulerStats).decode(MsgpackEncoder().encode(stats))
    assert Stats.detach(received) == one(Stats, failures={"no-mass": 2})


def test_old_observations_are_forgotten_counts_are_not(Stats):
    """What the scheduler keeps for its whole life does not grow with it."""
    totals = Stats()
    for _ in range(5):
        totals.add(one(Stats))
        totals.forget_old_observations(keep=3)
    assert totals.compactions == 5 and totals.tokens == 5000
    assert len(totals.seconds) == len(totals.output_errors) == len(totals.mass_errors) == 3
