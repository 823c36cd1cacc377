"""The entry point that vLLM calls in every process (group ``vllm.general_plugins``)."""

from __future__ import annotations


def register() -> None:
    """Add the flags and the switch. Inert otherwise: no other vLLM class is touched until an
    engine is configured with compaction on. vLLM may call this more than once per process."""
    # Imported here: the entry point is loaded before vLLM's own modules can be.
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs, "_kv_compaction_installed"):
        return
    EngineArgs._kv_compaction_installed = True
    from vllm_am.engine.frontend import activate, flags

    flags.install()
    activate.install()
