"""Which text recent prompts had in common."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_am.engine.scheduler.recent_prompts import RecentPrompts


def hashes(text: str) -> list[bytes]:
    """A chained hash of each letter, as if it were a block."""
    found, last = [], b""
    for letter in text:
        last = hashlib.sha256(last + letter.encode()).digest()
        found.append(last)
    return found


#: prompts before, the prompt (which is counted, too), leading blocks in common
CASES = {
    "alone": ([], "docq", 0),
    "nothing-in-common": (["xyz"], "docq", 0),
    "another-question": (["docx"], "docq", 3),
    "the-same-again": (["docq"], "docq", 4),
    "the-same-again-and-another": (["docq", "docx"], "docq", 3),
    "a-part-of-it": (["doc"], "docq", 3),
    "the-beginning-of-others": (["docx", "docy"], "doc", 3),
    "deepest-of-several": (["sysx", "sysdocx", "sysy"], "sysdocq", 6),
    "a-chat": (["turn1"], "turn1turn2", 5),
    "empty": (["docq"], "", 0),
}


@pytest.mark.parametrize(("before", "prompt", "common"), CASES.values(), ids=CASES.keys())
def test_where_others_went_on_differently(before, prompt, common):
    table = RecentPrompts()
    for other in (*before, prompt):
        table.add(hashes(other))
    assert table.common(hashes(prompt)) == common


@given(st.lists(st.text("ab", max_size=12), min_size=1, max_size=12), st.data())
def test_against_counting_prefixes(prompts, data):
    table = RecentPrompts()
    for prompt in prompts:
        table.add(hashes(prompt))
    asked = data.draw(st.sampled_from(prompts))
    counts = [sum(p.startswith(asked[: n + 1]) for p in prompts) for n in range(len(asked))]
    drops = [n + 1 for n in range(len(asked) - 1) if counts[n + 1] < counts[n]]
    whole = len(asked) if counts and counts[-1] > 1 else 0
    assert table.common(hashes(asked)) == (drops[-1] if drops else whole)


@given(st.lists(st.text("abc", min_size=1, max_size=9), max_size=30), st.integers(20, 40))
def test_places_lost_to_others_are_no_end_of_what_is_common(others, length):
    """In a table so small that most blocks lose theirs."""
    table = RecentPrompts(capacity=8)
    prompt = "x" * length
    table.add(hashes(prompt))
    for other in others:
        table.add(hashes(other))
    assert table.common(hashes(prompt)) == 0


def test_it_stays_small_and_forgets_the_oldest_in_a_place():
    table = RecentPrompts(capacity=64)
    for n in range(100):
        table.add(hashes(f"{n} is a long prompt of its own"))
    table.add(hashes("docx"))
    table.add(hashes("docq"))
    assert table.common(hashes("docq")) == 3
    assert table.common(hashes("0 is a long prompt of its own")) == 0


def test_counts_do_not_overflow():
    table = RecentPrompts()
    table._counts[:] = 65534
    table._names[:] = 1
    for text in ("doc", "docx", "docq"):
        table.add(hashes(text))
    assert table.common(hashes("docq")) == 3
    for _ in range(70_000):
        table.add(hashes("d"))
    assert table.common(hashes("docq")) == 3
