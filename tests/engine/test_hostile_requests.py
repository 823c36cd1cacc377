"""Nothing that a request brings stops the engine or touches another request.

Requests get here as past a front end that checks nothing: straight into the engine core.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine import driver
from tests.engine.driver import Ask, random_prompt
from vllm_am.config import RequestOverrides

pytestmark = pytest.mark.engine

OPTIONS = {"ratio": 0.25, "threshold": 160, "recent_tokens": 16}
#: One is compacted, one is not.
BYSTANDERS = [Ask(random_prompt(random.Random(i), 40 + 300 * i), 10) for i in range(2)]
HOSTILE_PROMPT = random_prompt(random.Random(9), 250)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 0, 1])
    | st.floats()
    | st.sampled_from(["on", "off", "10x", "0x", "1e-310", "9" * 5000, "80%", "nan", "-1", ""])
    | st.text(max_size=20)
    | st.binary(max_size=8)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
keys = (
    st.sampled_from(RequestOverrides.FIELDS)
    | st.sampled_from(["kv-compaction", "KV_COMPACTION", "kv_compaction_", "kv_compaction_rati"])
    | st.text(max_size=12)
)


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.fixture(scope="module")
def engine(tiny_model):
    small = {"num_gpu_blocks_override": 65, "max_model_len": 2600, "max_num_batched_tokens": 128}
    with driver.start(tiny_model, OPTIONS, **small) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    """What the bystanders answer without the hostile request."""
    outputs = engine.run(BYSTANDERS, names="alone-")
    return [outputs[f"alone-{i}"] for i in range(len(BYSTANDERS))]


_number = iter(range(1 << 30))


def serve(engine, alone, extra_args, max_tokens=6) -> str:
    """Serve a hostile request among bystanders, who must not notice; its finish reason."""
    from vllm import SamplingParams

    number = next(_number)
    name, names = f"hostile-{number}", f"beside-{number}-"

    def throw(engine, step):
        if step:
            return
        front_end = engine.llm.llm_engine
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        prompt = {"prompt_token_ids": list(HOSTILE_PROMPT)}
        request = front_end.input_processor.process_inputs(name, prompt, params, ("generate",))
        front_end.input_processor.assign_request_id(request)
        request.sampling_params.extra_args = extra_args
        front_end.output_processor.add_request(request, None, None, 0)
        front_end.engine_core.add_request(request)

    engine.before_step = throw
    # Bystanders begin as they did alone, and not on what they left behind the last time.
    assert engine.scheduler.reset_prefix_cache()
    try:
        outputs = engine.run(BYSTANDERS, names=names)
    finally:
        engine.before_step = None
    assert [outputs[f"{names}{i}"] for i in range(len(BYSTANDERS))] == alone
    assert engine.used_blocks == 0 and not engine.scheduler.requests
    compaction = engine.scheduler.compaction
    assert not compaction.sequences.known and not compaction.jobs.running
    return engine.finish_reasons[name]


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(extra=st.dictionaries(keys, values, max_size=3))
def test_arbitrary_options_past_all_front_ends(engine, alone, extra):
    """Right ones are served, wrong ones finished with an error: by the same rule as front ends'."""
    from vllm_am.config import CompactionConfigError

    compaction = engine.scheduler.compaction
    try:
        overrides = RequestOverrides.from_extra_args(extra)
        prompt = len(HOSTILE_PROMPT)
        compaction.limits.check_request(
            overrides, prompt, prompt + 6, compaction.planner.num_blocks
        )
        expected = "length"
    except CompactionConfigError as error:
        assert len(str(error)) < 600
        expected = "error"
    assert serve(engine, alone, extra) == expected


CASES = {
    "critical": ({"kv_compaction_ratio": "0"}, "error"),
    "sideways": ({"kv_compaction": "sideways"}, "error"),
    "deep": ({"kv_compaction_ratio": nested(10_000)}, "error"),
    "huge-number": ({"kv_compaction_threshold": 10**6000}, "error"),
    "tiny-ratio": ({"kv_compaction_ratio": 1e-308}, "error"),
    "other-plugin": ({"mine": nested(50)}, "length"),
    "off": ({"kv_compaction": "off"}, "length"),
    "prefix": ({"kv_compaction_prefix_tokens": 200}, "length"),
    "longer-prefix": ({"kv_compaction_prefix_tokens": 2000}, "error"),
    "huge-prefix": ({"kv_compaction_prefix_tokens": 10**400}, "error"),
    "messages": ({"kv_compaction_prefix": "messages:1"}, "error"),
    "useless-threshold": ({"kv_compaction_threshold": 1}, "error"),
    "least-ratio": ({"kv_compaction_ratio": 1e-6}, "length"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_options_that_once_stopped_the_engine(engine, alone, case):
    extra, reason = case
    assert serve(engine, alone, extra) == reason


def test_options_that_outgrow_the_pool(engine, alone):
    """64 blocks hold 2,048 tokens: uncompacted it would be preempted and computed for ever."""
    assert serve(engine, alone, {"kv_compaction": "off"}, max_tokens=1900) == "error"
    assert serve(engine, alone, {"kv_compaction": "off"}, max_tokens=200) == "length"
