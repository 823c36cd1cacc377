"""Versions of vLLM: which are supported, and that our contacts hold in each of them."""

from __future__ import annotations

import pytest

from scripts.check_vllm import (
    InstalledSources,
    Unreachable,
    Verdict,
    Version,
    WheelSources,
    check,
)
from vllm_am.config import CompactionConfigError
from vllm_am.engine.versions import SUPPORTED, note_error
from vllm_am.engine.versions import check as check_version

KNOWN = Version(InstalledSources())
SCHEDULER = "v1.core.sched.scheduler.Scheduler"


def breaks(verdicts: list[Verdict]) -> dict[str, list[str]]:
    return {verdict.contact.symbol: verdict.breaks for verdict in verdicts if verdict.breaks}


@pytest.mark.parametrize("series", SUPPORTED)
def test_contacts_hold_in_every_supported_version(series):
    """Read in the files of its first release, of which only these are fetched."""
    try:
        verdicts = check(Version(WheelSources(f"{series}.0")), KNOWN)
    except Unreachable as error:
        pytest.skip(f"the package index cannot be asked: {error}")
    assert breaks(verdicts) == {}


def test_what_differs_between_versions_is_seen():
    try:
        verdicts = check(Version(WheelSources("0.33.0")), KNOWN)
    except Unreachable as error:
        pytest.skip(f"the package index cannot be asked: {error}")
    differs = {v.contact.symbol: "; ".join(v.differs) for v in verdicts if v.differs}
    assert "max_cache_hit_length=" in differs[SCHEDULER]
    assert "grammar_compile_error_reqs was set[str], and is dict" in differs[SCHEDULER]


class Changed(InstalledSources):
    """The installed vLLM with one text in one file replaced."""

    def __init__(self, path: str, old: str, new: str) -> None:
        super().__init__()
        self.path, self.old, self.new = path, old, new

    def read(self, path: str) -> str | None:
        text = super().read(path)
        if path != self.path:
            return text
        assert text is not None and self.old in text
        return text.replace(self.old, self.new)


OUTPUTS, CORE = "vllm/v1/outputs.py", "vllm/v1/core/sched/scheduler.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "old", "new", "symbol", "message"),
    [
        (CORE, "def _preempt_request(", "def _evict(", SCHEDULER, "has no _preempt_request"),
        (CORE, "self.grammar_compile_error_reqs", "self.errors", SCHEDULER, "has no grammar"),
        (
            CORE,
            "def _preempt_request(\n        self,",
            "def _preempt_request(\n        self, why: str, how: str, who: str,",
            SCHEDULER,
            "_preempt_request(why, how, who, request, timestamp",
        ),
        (
            OUTPUTS,
            "class AsyncModelRunnerOutput(ABC):",
            "class AsyncModelRunnerOutput(ABC):\n    @abstractmethod\n    def more(self): ...\n",
            "v1.outputs.AsyncModelRunnerOutput",
            "more is abstract",
        ),
        (
            "vllm/utils/math_utils.py",
            "def cdiv(a: int, b: int)",
            "def cdiv(a: int)",
            "utils.math_utils.cdiv",
            "(a, b) is now (a)",
        ),
        (
            "vllm/distributed/parallel_state.py",
            "def get_pp_group(",
            "def get_pipeline_group(",
            "distributed.get_pp_group",
            "is not there",
        ),
    ],
    ids=["method", "attribute", "override", "abstract", "call", "symbol"],
)
def test_what_would_break_is_found(path, old, new, symbol, message):
    found = breaks(check(Version(Changed(path, old, new)), KNOWN))
    assert list(found) == [symbol]
    assert any(message in line for line in found[symbol]), found


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1.dev3+g12", "0.33.0"])
def test_supported_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.3.3", "1.0.0", "0.320.0"])
def test_other_versions_are_refused_by_name(version):
    with pytest.raises(CompactionConfigError) as refusal:
        check_version(version)
    for word in ("--kv-compaction", "0.32 and 0.33", f"vLLM {version} is installed"):
        assert word in str(refusal.value)


def test_an_unsupported_version_is_refused_where_compaction_is_asked_for(
    engine_config, monkeypatch
):
    from vllm_am.engine import versions

    monkeypatch.setattr(versions, "__version__", "0.99.0")
    with pytest.raises(CompactionConfigError, match=r"0\.99\.0 is installed"):
        engine_config()
    engine_config(additional_config={})  # nobody else is troubled


def test_errors_are_noted_in_both_ways():
    ids: set[str] = set()
    errors: dict[str, object] = {}
    for noted in (ids, errors):
        note_error(noted, "a", "why")
    assert ids == {"a"} and errors == {"a": "why"}


def test_reports_ride_on_outputs_of_both_kinds():
    """From 0.33 on an output must also give the KV connector's."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    from vllm_am.engine.worker.worker import ReportingOutput

    class Output(AsyncModelRunnerOutput):
        def get_output(self):
            raise NotImplementedError

        def get_kv_connector_output(self):
            return "theirs"

    assert ReportingOutput(Output(), []).get_kv_connector_output() == "theirs"
