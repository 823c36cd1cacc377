"""vllm-am: Attention Matching KV-cache compaction for vLLM.

``compact`` is the method on plain tensors; ``LLM`` is vLLM's with a ``kv_compaction`` argument.
Installing the package is all that ``vllm serve --kv-compaction`` needs.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_am.compaction import CompactedKV, compact
    from vllm_am.config import CompactionConfig
    from vllm_am.llm import LLM

__all__ = ["LLM", "CompactedKV", "CompactionConfig", "compact"]

_HOMES = {
    "LLM": "vllm_am.llm",
    "CompactedKV": "vllm_am.compaction",
    "CompactionConfig": "vllm_am.config",
    "compact": "vllm_am.compaction",
}


def __getattr__(name: str) -> Any:
    # Lazily: vLLM imports this package in every process, and the math must not import vLLM.
    if name == "__version__":
        return metadata.version("vllm-am")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
