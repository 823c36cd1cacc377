"""What our attention layers are: plain ones, and whatever else a layer turns out to be is refused.

vLLM symbol touched: ``v1.attention.backend.AttentionImpl`` (its constructor's arguments).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import AttentionType

from vllm_am.engine.capabilities import check_layer

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImpl as _Impl
else:
    _Impl = object


class PlainLayer(_Impl):
    """Constructor of our attention layers, over vLLM's for the platform: refuses what it must.

    The arguments are those with which vLLM constructs any attention layer.

    Raises:
        UnsupportedByCompaction: naming the layer's feature.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        check_layer(
            "attention layer",
            ALiBi=alibi_slopes,
            sliding_window=sliding_window,
            soft_capping=logits_soft_cap or None,
            shared_KV_layers=kv_sharing_target_layer_name,
            non_decoder_attention=attn_type if attn_type != AttentionType.DECODER else None,
        )
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, None, None, kv_cache_dtype, sinks=sinks
        )
