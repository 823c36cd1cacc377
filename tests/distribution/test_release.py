"""What has to be said in three files before a release."""

from __future__ import annotations

import re

import pytest

from scripts.release import ROOT, NotReady, version_to_release

PROJECT = '[project]\nversion = "0.2.0"\n'
CHANGELOG = "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n- …\n"
CITATION = "version: 0.2.0\n"


def test_all_files_agree():
    assert version_to_release(PROJECT, CHANGELOG, CITATION) == "0.2.0"


@pytest.mark.parametrize(
    ("changelog", "citation", "names"),
    [
        (CHANGELOG.replace("2026-12-01", "unreleased"), CITATION, "CHANGELOG.md"),
        (CHANGELOG.replace("0.2.0", "0.1.0"), CITATION, "CHANGELOG.md"),
        (CHANGELOG, "version: 0.1.0\n", "CITATION.cff"),
    ],
)
def test_what_is_missing_is_named(changelog, citation, names):
    with pytest.raises(NotReady, match=names):
        version_to_release(PROJECT, changelog, citation)


def test_this_checkout_needs_no_more_than_a_date():
    changelog = (ROOT / "CHANGELOG.md").read_text().replace("(unreleased)", "(2026-12-01)")
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "CITATION.cff")]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version_to_release(texts[0], changelog, texts[1]))
