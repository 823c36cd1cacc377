"""The KV cache spec of compactable layers: made by the workers, read by the engine core.

vLLM symbol touched: ``v1.kv_cache_interface.FullAttentionSpec`` (subclassed), so that vLLM sizes
the pool and groups the layers by it; its blocks are managed by ``scheduler/blocks.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from vllm_am.engine.capabilities import UnsupportedByCompaction
from vllm_am.engine.classes import register_cache_spec


def check_alike(specs: Iterable[KVCacheSpec]) -> None:
    """Refuse models whose compactable layers differ: a page may serve any head of any of them.

    Raises:
        UnsupportedByCompaction: naming in what they differ.
    """
    ours = [spec for spec in specs if isinstance(spec, CompactableAttentionSpec)]
    for field, name in (("num_kv_heads", "numbers of KV heads"), ("head_size", "head sizes")):
        values = sorted({getattr(spec, field) for spec in ours})
        if len(values) > 1:
            raise UnsupportedByCompaction(
                f"--kv-compaction does not support full-attention layers with different {name} "
                f"({', '.join(map(str, values))}) yet: drop --kv-compaction"
            )


@dataclass(frozen=True, kw_only=True)
class CompactableAttentionSpec(FullAttentionSpec):
    """Full attention whose sequences may be compacted while they run."""

    peak_tokens: int = 0
    """Most tokens' worth of slots that one sequence needs at a time (``Footprint.peak_tokens``)."""

    @classmethod
    def from_spec(cls, spec: KVCacheSpec, peak_tokens: int) -> KVCacheSpec:
        """``spec`` as a compactable one; any other kind than full attention is left as it is."""
        if type(spec) is not FullAttentionSpec:
            return spec
        return replace_as(spec, cls, peak_tokens=peak_tokens)

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for a group. vLLM's merge lists its fields by hand and would drop ours.

        vLLM tells "these layers cannot share a group" from an AssertionError, hence ``assert``.
        """
        assert all(isinstance(s, cls) for s in specs), "compactable and plain layers do not mix"
        assert len({s.peak_tokens for s in specs}) == 1
        return replace(super().merge(specs), peak_tokens=specs[0].peak_tokens)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request of ``max_model_len`` needs: vLLM's startup check compares the pool."""
        tokens = min(vllm_config.model_config.max_model_len, self.peak_tokens)
        return cdiv(tokens, self.block_size) * self.page_size_bytes


# At import: unpickling a spec in the engine core imports this module and so registers it there.
register_cache_spec(CompactableAttentionSpec)
