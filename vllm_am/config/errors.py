"""The one error of a bad option, and how its value is quoted."""

from __future__ import annotations

from typing import Any

#: Characters of a value that a message repeats: a file that was pasted says nothing.
LONGEST_QUOTE = 200


class CompactionConfigError(ValueError):
    """An invalid option. The message names the flag and says how to mend it."""


def shown(value: Any) -> str:
    """A user's value, as a message repeats it: whatever it is, and not more than a line."""
    try:
        text = repr(value)
    except Exception:  # nested too deeply, or a number of too many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 3]}..."
