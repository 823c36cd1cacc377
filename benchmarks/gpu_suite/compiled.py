"""What Triton compiles while an engine serves: nothing of ours should be left to that."""

from __future__ import annotations

from typing import Any


def compiled_from_now_on() -> list[str]:
    """A list that our Triton kernels add their names to when they are compiled, or loaded from a
    cache: what happens in the middle of serving then."""
    names: list[str] = []
    try:
        from triton import knobs
    except ImportError:  # no Triton, no kernels
        return names

    def note(*, fn: Any, **_: Any) -> None:
        if fn.module.startswith("vllm_am."):
            names.append(fn.name)

    knobs.runtime.jit_post_compile_hook = note
    return names
