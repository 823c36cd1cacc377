"""What a fit takes beside the KV cache on a CPU: the formula of docs/how-it-works.md ("Memory")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_cost.counting import Counts
from vllm_am.compaction.compact import MOST_FITTED_SLOTS
from vllm_am.compaction.pages import PagedKV
from vllm_am.compaction.streaming import DEFAULT_CHUNK_BYTES

pytestmark = pytest.mark.engine

BLOCK = 32
#: Of heads that are solved together, and of statistics that are kept from measuring to fitting.
GRAM_BYTES, KEPT_BYTES = 64 << 20, 256 << 20


class Held(TorchDispatchMode):
    """Counts the tensors that live."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        for x in _tensors(result):
            if x.untyped_storage()._cdata not in given:
                self.counts.hold(x)
        return result


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "kv_heads", "group", "tokens", "ratio", "parts"),
    [
        (4, 2, 4, 2048, 0.1, 1),
        (2, 2, 4, 4096, 0.1, 2),
        (2, 1, 1, 4096, 0.3, 1),
    ],
)
def test_the_formula_holds(layers, kv_heads, group, tokens, ratio, parts):
    from vllm_am.config import CompactionConfig
    from vllm_am.engine.limits import KEPT_STATISTICS_BYTES
    from vllm_am.engine.messages import FitSlice, HeadRange, Segment
    from vllm_am.engine.worker.fitting import FitProgress, Fitting
    from vllm_am.engine.worker.rotary import Rotary

    assert KEPT_STATISTICS_BYTES == KEPT_BYTES
    size, positions = 64, 8192 // group // 2
    blocks, target = tokens // BLOCK, -(-round(ratio * tokens) // BLOCK)
    shape = (layers, blocks + target + 1, kv_heads, BLOCK, 2 * size)
    generator = torch.Generator().manual_seed(0)
    kv = PagedKV.from_layers(list(torch.randn(shape, generator=generator)))
    pools = [
        torch.randn(positions, kv_heads * group, size, generator=generator) for _ in range(layers)
    ]
    rotary = Rotary(torch.rand(size // 2, generator=generator).double(), False)
    config = CompactionConfig(ratio=ratio)
    fitting = Fitting(config, kv, pools, size**-0.5, None, [rotary] * layers, DEFAULT_CHUNK_BYTES)
    source, into = tuple(range(1, 1 + blocks)), tuple(range(1 + blocks, 1 + blocks + target))
    progress = FitProgress(kv.block_pages(source))
    with torch.inference_mode(), Held() as counted:
        for part in range(2 * parts):
            turn, number = divmod(part, parts)
            every = layers * kv_heads
            fit = FitSlice(
                job_id=0,
                request_id="",
                segment=Segment(0, tokens, target * BLOCK, into),
                source_block_ids=source,
                query_slots=np.arange(positions),
                query_shifts=np.zeros(positions, dtype=np.int64),
                method=config.method,
                heads=HeadRange(every * number // parts, every * (number + 1) // parts, every),
                measures=turn == 0,
            )
            fitting._run_slice(fit, progress)
    assert progress.heads == layers * kv_heads

    heads, queries = layers * kv_heads // parts, positions * group
    slots = min(MOST_FITTED_SLOTS, max(len(pages) for pages in progress.lists) * BLOCK)
    gram = max(slots**2 * 8, min(GRAM_BYTES, heads * slots**2 * 8))
    kept = min(KEPT_BYTES, layers * kv_heads * (queries * (size + 1) + tokens) * 4)
    formula = 9 * gram + kept + heads * (2 * tokens * 2 * size + 4 * queries * size) * 4
    assert formula / 5 < counted.counts.peak <= formula
