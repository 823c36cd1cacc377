"""Failures seen in other compaction engines: every row that applies has a test named after it.

Rows: 1 blocks flagged but never freed; 2 shared prefix blocks rewritten; 3 stale lengths under
concurrency; 4 preemption keeps compaction state; 5 fires during chunked prefill and drops too much;
6 silently off on the other model runner; 7 non-contiguous cache; 8 mixed batches; 9 first trigger
too early; 10 defaults that differ from the published; 11 bias target and design matrix differ;
12 values fitted without the bias; 13 degenerate fits; 14 host syncs in decode; 15 everything is
forgotten after compaction; 16 options lost on copies; 17 identity; 18 an option that does nothing;
19 drift over rounds; 20 startup refuses long contexts; 21 checks only in the process that parsed
the flags; 22 an error after "200 OK"; 23 lossy state under the key of the exact one.
"""

from __future__ import annotations

import re
from pathlib import Path

ROWS = set(range(1, 24))


def test_every_row_has_a_test():
    named = set()
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        for rows in re.findall(r"def test_museum((?:_\d+)+)_", path.read_text()):
            named |= {int(row) for row in rows.strip("_").split("_")}
    assert named == ROWS
