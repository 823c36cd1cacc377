"""Acceptance 7 (museum row 13): a fit that fails leaves the sequence exact and disturbs nobody."""

from __future__ import annotations

import random

import pytest
import torch

from tests.engine import driver
from tests.engine.driver import Ask, random_prompt

pytestmark = [pytest.mark.engine]

OPTIONS = {"ratio": 0.25, "threshold": 160, "recent_tokens": 16}


def _asks():
    return [Ask(random_prompt(random.Random(i), 300 + 20 * i), 12) for i in range(4)]


@pytest.fixture(scope="module")
def stock(tiny_model):
    with driver.start(tiny_model) as engine:
        return engine.run(_asks())


def _nan_queries(fitting_module, monkeypatch):
    original = fitting_module.Fitting._reference_queries

    def poisoned(self, layers, fit):
        reference, heldout = original(self, layers, fit)
        reference = reference.clone()
        reference[0, 0, 0] = float("nan")
        return reference, heldout

    monkeypatch.setattr(fitting_module.Fitting, "_reference_queries", poisoned)


def _no_queries(fitting_module, monkeypatch):
    original = fitting_module.Fitting._reference_queries

    def none(self, layers, fit):
        reference, heldout = original(self, layers, fit)
        return reference[:, :0], heldout

    monkeypatch.setattr(fitting_module.Fitting, "_reference_queries", none)


def _raises(error):
    def apply(fitting_module, monkeypatch):
        def compact(*args, **kwargs):
            raise error

        monkeypatch.setattr(fitting_module, "compact", compact)

    return apply


def _fit_error(reason):
    from vllm_am.compaction import FitError

    return FitError(reason, heads=[0])


@pytest.mark.parametrize(
    ("reason", "inject"),
    [
        ("non-finite", _nan_queries),
        ("no-queries", _no_queries),
        ("singular", lambda w, m: _raises(_fit_error("singular"))(w, m)),
        ("no-mass", lambda w, m: _raises(_fit_error("no-mass"))(w, m)),
        ("out-of-memory", lambda w, m: _raises(torch.OutOfMemoryError("no memory"))(w, m)),
        ("internal-error", lambda w, m: _raises(RuntimeError("broken kernel"))(w, m)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_museum_13_failed_fit_leaves_the_sequence_exact(
    tiny_model, stock, monkeypatch, reason, inject
):
    from vllm_am.engine.worker import fitting

    with driver.start(tiny_model, OPTIONS) as engine:
        inject(fitting, monkeypatch)
        outputs = engine.run(_asks())
        assert engine.totals.compactions == 0
        assert set(engine.totals.failures) == {reason}
        # Once per request: it is not tried again at every step.
        assert engine.totals.failures[reason] == 4
        assert engine.used_blocks == 0
        assert not engine.worker._compaction.fitting.running
    assert outputs == stock


def test_one_failing_layer_and_request_do_not_touch_the_others(tiny_model, monkeypatch):
    """Only the second request's fit fails, only in its last layer: the others compact as ever."""
    from vllm_am.compaction import FitError
    from vllm_am.engine.worker import fitting

    with driver.start(tiny_model, OPTIONS) as engine:
        healthy = engine.run(_asks())
    with driver.start(tiny_model) as engine:
        exact = engine.run(_asks())
    original = fitting.Fitting._fit_heads

    def fails_once(self, heads, fit, progress):
        if fit.request_id.startswith("1") and self.heads - 1 in heads:
            raise FitError("singular", heads=[1])
        original(self, heads, fit, progress)

    monkeypatch.setattr(fitting.Fitting, "_fit_heads", fails_once)
    with driver.start(tiny_model, OPTIONS) as engine:
        outputs = engine.run(_asks())
        assert engine.totals.failures == {"singular": 1}
        assert engine.totals.compactions == 3
    assert outputs["1"] == exact["1"]
    assert {k: outputs[k] for k in "023"} == {k: healthy[k] for k in "023"}


def test_span_that_would_not_shrink_is_left_alone(tiny_model, stock):
    """t >= T, or no block to gain: nothing is attempted, nothing fails."""
    # From 6,400 tokens on a block comes free: startup takes the ratio, short spans do not shrink.
    with driver.start(tiny_model, {**OPTIONS, "ratio": 0.995}, max_model_len=8192) as engine:
        assert engine.run(_asks()) == stock
        assert engine.totals.compactions == 0 and not engine.totals.failures


@pytest.mark.slow
def test_fit_above_the_error_bound_keeps_more_slots(tiny_model, stock):
    """``max_error``: doubled until the error is below it; if nothing would be saved, exact."""
    with driver.start(tiny_model, {**OPTIONS, "ratio": 0.05}) as engine:
        engine.run(_asks())
        loose = list(engine.totals.output_errors)
        least = engine.totals.slots
    bound = 0.8 * min(loose)
    with driver.start(tiny_model, {**OPTIONS, "ratio": 0.05, "max_error": bound}) as engine:
        engine.run(_asks())
        assert engine.totals.compactions == 4
        assert max(engine.totals.output_errors) <= bound
        assert engine.totals.slots > 1.5 * least
        assert engine.totals.failures["max-error"] >= 4
        assert engine.used_blocks == 0
    with driver.start(tiny_model, {**OPTIONS, "max_error": 1e-6}) as engine:
        assert engine.run(_asks()) == stock
        assert engine.totals.compactions == 0 and set(engine.totals.failures) == {"max-error"}


def test_nan_in_the_cache_of_one_request(tiny_model, monkeypatch):
    """NaN keys of one sequence fail its own fit; a concurrent request's tokens do not change."""
    asks = _asks()[:2]
    with driver.start(tiny_model, OPTIONS) as engine:
        healthy = engine.run(asks)
    with driver.start(tiny_model, OPTIONS) as engine:
        from vllm_am.engine.worker import fitting

        original = fitting.read_pages
        state = engine.worker._compaction
        run = fitting.Fitting._run_slice
        current = []

        def remember(self, fit, progress):
            current[:] = [fit.request_id]
            return run(self, fit, progress)

        def poisoned(kv, pages):
            keys, values = original(kv, pages)
            if current[0].startswith("1"):
                keys = keys.clone()
                keys[:, 3] = float("nan")
            return keys, values

        monkeypatch.setattr(fitting.Fitting, "_run_slice", remember)
        monkeypatch.setattr(fitting, "read_pages", poisoned)
        outputs = engine.run(asks)
        assert engine.totals.failures == {"non-finite": 1}
        assert engine.totals.compactions == 1
        assert not state.sequences
    assert outputs["0"] == healthy["0"]


#: 1,152 slots: a sequence of more tokens is served only as long as its fits succeed.
SMALL_POOL = {"num_gpu_blocks_override": 37, "max_model_len": 2048, "max_num_batched_tokens": 64}


@pytest.mark.slow
@pytest.mark.parametrize("force_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("prompt", "answer"), [(1300, 8), (600, 700)], ids=["prompt", "answer"])
def test_what_never_fits_is_finished_with_an_error(
    tiny_model, monkeypatch, prompt, answer, force_async
):
    """All its fits fail and the pool is too small without: no endless recomputation.

    Requests beside it and behind it are served as ever.
    """
    asks = [
        Ask(random_prompt(random.Random(0), prompt), answer),
        Ask(random_prompt(random.Random(1), 100), 20),
        Ask(random_prompt(random.Random(2), 120), 20, arrives=60),
    ]
    with driver.start(tiny_model) as engine:
        stock = engine.run(asks)
    from vllm_am.engine.scheduler import journal
    from vllm_am.engine.worker import fitting

    errors = []
    monkeypatch.setattr(journal.logger, "error", lambda message, *args: errors.append(message))
    options = {**OPTIONS, "ratio": 0.1, "threshold": 320}
    with driver.start(tiny_model, options, force_async, **SMALL_POOL) as engine:
        assert len(engine.run(asks[:1])["0"]) == answer, "it fits where fits succeed"
        assert not engine.totals.failures
    with driver.start(tiny_model, options, force_async, **SMALL_POOL) as engine:
        _raises(_fit_error("singular"))(fitting, monkeypatch)
        engine.before_step = _no_more_steps_than(3000)
        outputs = engine.run(asks)
        assert engine.finish_reasons == {"0": "error", "1": "length", "2": "length"}
        assert outputs["0"] == stock["0"][: len(outputs["0"])]
        assert {k: outputs[k] for k in "12"} == {k: stock[k] for k in "12"}
        assert engine.used_blocks == 0 and not engine.scheduler.compaction.sequences.known
    assert len(errors) == 1 and "is finished with an error" in errors[0]


def test_passing_failure_is_outlived_by_computing_anew(tiny_model, monkeypatch):
    """Fits that fail only the first time round, as for a passing lack of memory."""
    from vllm_am.engine.worker import fitting

    ask = Ask(random_prompt(random.Random(0), 1300), 8)
    original = fitting.compact
    options = {**OPTIONS, "ratio": 0.1, "threshold": 320}
    with driver.start(tiny_model, options, **SMALL_POOL) as engine:

        def compact(*args, **kwargs):
            (request,) = engine.scheduler.requests.values()
            if not request.num_preemptions:
                raise torch.OutOfMemoryError("no memory")
            return original(*args, **kwargs)

        monkeypatch.setattr(fitting, "compact", compact)
        engine.before_step = _no_more_steps_than(3000)
        assert len(engine.run([ask])["0"]) == 8
        assert engine.finish_reasons == {"0": "length"}
        assert engine.totals.failures and engine.totals.compactions >= 2


def _no_more_steps_than(most):
    def check(engine, step):
        assert step < most, "an endless loop"

    return check
