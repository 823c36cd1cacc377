"""The one error of a bad option."""

from __future__ import annotations


class CompactionConfigError(ValueError):
    """An invalid option. The message names the flag and says how to mend it."""
