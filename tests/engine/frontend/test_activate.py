"""What is said at startup."""

from __future__ import annotations

import pytest


@pytest.fixture
def said(engine_config, monkeypatch):
    """The line, and the warning if there is one, of an engine with these options."""
    from vllm_am.engine.frontend import activate

    def start(options, **arguments):
        lines = []
        for level in ("info", "warning"):
            monkeypatch.setattr(
                activate.logger, level, lambda text, *values: lines.append(text % values)
            )
        engine_config(options, **arguments)
        return lines

    return start


def test_a_ratio_that_is_reached_is_not_worth_a_warning(said):
    (line,) = said({"ratio": "10x", "threshold": 1024}, block_size=16)
    assert "keeps 0.1 of the KV (10.0x), threshold 1024 tokens" in line
    assert "in whole blocks of 16 compacted spans shrink by 8.7x to 10.0x" in line


def test_a_ratio_that_is_not_reached_is(said):
    line, warning = said({"ratio": "50x", "threshold": 512, "recent_tokens": 32}, block_size=128)
    assert "blocks of 128 compacted spans shrink by 2.0x" in line
    assert "50.0x is asked for, and the shortest spans shrink by 2.0x only" in warning
    assert "--block-size 16 gives" in warning and "raise --kv-compaction-threshold" in warning


def test_no_block_size_is_advised_where_none_is_smaller(said):
    _, warning = said({"ratio": "50x", "threshold": 160}, block_size=16)
    assert "--block-size" not in warning


def test_a_ratio_of_one_is_said_to_do_nothing(said):
    _, warning = said({"ratio": 1, "threshold": 1024}, block_size=16)
    assert "--kv-compaction-ratio 1 keeps everything" in warning
