"""``vllm-am doctor`` and ``--version``: what they say where all is well, and where it is not."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import vllm_am
from vllm_am import doctor
from vllm_am.cli import app
from vllm_am.doctor import Verdict
from vllm_am.engine import versions
from vllm_am.kernels import cpu_library


def found() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.findings()}


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output.strip() == f"vllm-am {version('vllm-am')}"
    assert vllm_am.__version__ == version("vllm-am")


@pytest.mark.slow
def test_all_is_well_here():
    """As CI's set-up leaves a machine; the plugin is looked for by a process of its own."""
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "a fresh process knows --kv-compaction" in result.output
    assert all(what in result.output for what in doctor.CHECKS)
    assert "failure" not in result.output


def without(*names: str):
    """The other checks take seconds, or a compiler."""
    return {what: check for what, check in doctor.CHECKS.items() if what in names}


def test_another_version_of_vllm(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", without("vLLM"))
    monkeypatch.setattr(versions, "SUPPORTED", ("0.1",))
    finding = found()["vLLM"]
    assert finding.verdict is Verdict.FAILURE and "supports vLLM 0.1" in finding.says
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_a_plugin_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", without("plugin"))
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert found()["plugin"].verdict is Verdict.FAILURE


def test_a_process_that_does_not_know_the_flag(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", without("plugin"))
    monkeypatch.setattr(doctor, "_PLUGIN_PROBE", "raise SystemExit('no such option')")
    finding = found()["plugin"]
    assert finding.verdict is Verdict.FAILURE and finding.says.endswith("no such option")


def test_without_a_compiled_kernel_it_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", without("attention kernel of CPUs"))
    none = cpu_library.Loaded(None, "no compiler")
    monkeypatch.setattr(cpu_library, "load", lambda: none)
    finding = found()["attention kernel of CPUs"]
    assert finding.verdict is Verdict.WARNING and "(no compiler)" in finding.says
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


def test_a_fit_that_is_worse_than_none(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", without("self-test"))
    errors = iter([0.9, 0.5])
    monkeypatch.setattr(
        "vllm_am.compaction.compact",
        lambda *_, **__: SimpleNamespace(output_error=SimpleNamespace(mean=lambda: next(errors))),
    )
    assert found()["self-test"].verdict is Verdict.FAILURE


def test_a_check_that_breaks_hides_no_other(monkeypatch):
    def broken():
        raise RuntimeError("a driver of another version")

    monkeypatch.setattr(doctor, "CHECKS", {"GPU": broken, **without("versions")})
    findings = found()
    assert findings["GPU"].verdict is Verdict.FAILURE
    assert findings["GPU"].says == "RuntimeError: a driver of another version"
    assert findings["versions"].verdict is Verdict.OK
