"""The documentation builds strictly, says what the code says, and its links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT
from vllm_am.config.option_help import option_help

#: Headings of troubleshooting.md that others write.
OF_OTHERS = {
    "No package metadata was found for vllm",
    "InvalidCxxCompiler",
    "unrecognized arguments: --kv-compaction",
    "/v1/kv_compaction/prefixes",
}


@pytest.mark.slow
def test_it_builds_strictly(tmp_path):
    """A link, an anchor or a snippet that is missing stops a strict build."""
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    pages = {path.parent.name: path.read_text() for path in tmp_path.glob("*/index.html")}
    for text in pages.values():
        assert "generated:" not in text and "--8" not in text
    assert all(f"<code>{option.name}</code>" in pages["options"] for option in option_help())
    assert "vllm:kv_compaction_thin_spans_total" in pages["metrics"]
    assert "Qwen3-Next" in pages["models"] and "MLA" in pages["models"]
    assert "many_questions.py" in pages["examples"]
    assert "KVCompactionFails" in pages["metrics"]


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def _texts_of_the_code() -> str:
    """Every string of the package; what is put into one at run time is left out."""
    found = []
    for path in (ROOT / "vllm_am").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "" for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def test_troubleshooting_quotes_what_the_code_says():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^####.*?`([^`]+)`", text, re.MULTILINE)
    known = _texts_of_the_code()
    assert len(quoted) > 15
    assert [q for q in quoted if q not in OF_OTHERS and q not in known] == []
