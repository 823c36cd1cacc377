"""How long a step of an engine takes, and a fit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from benchmarks.gpu_cost.devices import H200
from vllm_am.plan import ITEMSIZE, Shape


@dataclass(frozen=True)
class Work:
    """What was done: of a step, or of a whole run."""

    steps: float = 0
    prompt_tokens: float = 0
    pairs: float = 0
    """Of a prompt's tokens with those before them."""
    sequences: float = 0
    """Tokens of answers."""
    held_tokens: float = 0
    """Exact tokens that tokens of answers attended to."""
    slots: float = 0
    """Compacted slots that they attended to."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Costs:
    """Seconds per unit of :class:`Work`, field by field; and of a fit.

    Attributes:
        fit_tokens: seconds per token of a compacted span.
        step_limit: most seconds that fits add to a step (``step_ms``), and ten times as many while
            somebody waits.
    """

    steps: float
    prompt_tokens: float
    pairs: float
    sequences: float
    held_tokens: float
    slots: float
    fit_tokens: float
    step_limit: float

    def seconds(self, work: Work) -> float:
        """Without fits."""
        return float(sum(getattr(self, f.name) * getattr(work, f.name) for f in fields(work)))


def shape_of(config: dict[str, Any]) -> Shape:
    """Of a configuration as ``config.json`` has it."""
    from transformers import AutoConfig

    return Shape.of(AutoConfig.for_model(**config), 1, ITEMSIZE)


#: Of the ceilings of a device, what engines reach: products of a prefill, its attention, reading.
PRODUCTS, ATTENTION, READING = 0.6, 0.45, 0.8
#: Seconds that a step takes beside its work, with CUDA graphs.
STEP = 0.5e-3
#: Attention to a slot against FlashAttention to a token, at worst (``benchmarks/results/gpu``).
SLOT = 1.22


def gpu_costs(shape: Shape) -> Costs:
    """Of a model on an H200, whole or one tensor-parallel rank of it (communication left out)."""
    parameters = shape.weight_bytes // ITEMSIZE
    rate, bandwidth = H200.rate["bf16"], H200.bandwidth * READING
    token = shape.token_bytes(ITEMSIZE) / bandwidth
    query_heads = shape.layers * shape.kv_heads * shape.queries_per_kv
    products = 2 * parameters / rate / PRODUCTS
    return Costs(
        steps=STEP + shape.weight_bytes / bandwidth,
        prompt_tokens=products,
        pairs=4 * query_heads * shape.head_size / rate / ATTENTION,
        sequences=products,
        held_tokens=token,
        slots=SLOT * token,
        fit_tokens=shape.fit_seconds_per_token(),
        step_limit=0.02,
    )
