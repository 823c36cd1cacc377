"""The engine back end: the same document, the same scores as the model in torch."""

from __future__ import annotations

import pytest

from benchmarks.quality import engine_backend
from benchmarks.quality.conversations import Mode, grade, make_conversations
from benchmarks.quality.tensor_backend import Reading, load_model
from benchmarks.recall.recipe import BUNDLED

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_forced_questions_after_the_compaction():
    conversations = make_conversations(0, 700, "sparse", Mode.AFTER, 4, 2, 1)
    options = {"method": "highest-attention", "budgets": "uniform"}
    full, half, tenth = engine_backend.run(
        BUNDLED.model, options, [None, 0.5, 0.05], conversations, Mode.AFTER
    )
    expected = Reading(load_model(), conversations[0], 0, 700, "sparse").full_score
    assert full.scores[0].log_probs == pytest.approx(list(expected.log_probs), abs=2e-3)
    assert (full.compactions, half.compactions, tenth.compactions) == (0, 1, 1)
    assert full.blocks == full.full_blocks > half.blocks > tenth.blocks
    nll = [grade(conversations, result.scores).nll for result in (full, half, tenth)]
    assert nll[0] < nll[1] < nll[2]


@pytest.mark.parametrize("on_policy", [False, True])
def test_reference_passes_are_no_conversations(on_policy):
    conversations = make_conversations(0, 700, "sparse", Mode.AFTER, 4, 2, 1)
    options = {"queries": "repeat-prefill", "on_policy": on_policy}
    (tenth,) = engine_backend.run(BUNDLED.model, options, [0.1], conversations, Mode.AFTER)
    assert tenth.compactions == 1 and not tenth.failures
    assert tenth.blocks < tenth.full_blocks / 2 and len(tenth.held) == len(conversations) == 1


def test_a_failing_engine_says_why():
    with pytest.raises(engine_backend.EngineError, match="nonsense"):
        engine_backend.run(
            BUNDLED.model,
            {"method": "nonsense"},
            [0.5],
            make_conversations(0, 700, "sparse", Mode.AFTER),
            Mode.AFTER,
        )
