"""``vllm-am plan``: what fits into a GPU with and without compaction, from a model's config alone.

The same arithmetic as in the engine: its limits, its planner, the bytes that its workers leave for
keys and values. What a plan does not know is what vLLM measures at startup, the activations of the
largest batch and CUDA graphs: leave room for them with ``--utilization``, as for vLLM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_am.config import CompactionConfig
from vllm_am.engine.footprint import ceil_div
from vllm_am.engine.layers import has_only_attention, has_window_layers
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.scheduler.planner import Planner, SequenceView
from vllm_am.engine.worker.state import gpu_fit_bytes

#: Of the two batches that vLLM has under way on a GPU, and of one on a CPU (its own defaults).
BATCHED_TOKENS = 8192

#: Bytes of a 16-bit number: of weights and keys.
ITEMSIZE = 2

#: Measured on an H200 (``benchmarks/results/gpu``): a fit of 32,768 tokens of Qwen3-4B (36 layers,
#: 8 heads of 128) takes 0.54 s with equal budgets, and 2.25 times as long with the default's.
FIT_SECONDS_PER_TOKEN_AND_HEAD = 2.25 * 0.54 / 32_768 / (36 * 8)

#: Ratios that are tried for a number of contexts, the gentlest first.
RATIOS_TO_TRY = (0.5, 0.2, 0.1, 0.05, 0.02)

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class PlanError(ValueError):
    """What was asked for cannot be planned; the message names the argument."""


def parse_size(text: str, unit: str = "") -> int:
    """A number such as ``128k`` or ``80GB``, in multiples of 1024.

    Raises:
        PlanError: it is none.
    """
    match = re.fullmatch(rf"([0-9.]+)\s*([kmgt]?)i?{unit}", text.strip().lower())
    try:
        assert match is not None
        return int(float(match[1]) * _UNITS[match[2]])
    except (AssertionError, ValueError):
        example = f"80G{unit.upper()}" if unit else "128k"
        raise PlanError(f"{text!r}: expected a size such as {example}") from None


@dataclass(frozen=True)
class Shape:
    """What of a model decides about its KV cache, on one of its tensor-parallel ranks."""

    layers: int
    kv_heads: int
    queries_per_kv: int
    head_size: int
    weight_bytes: int

    @classmethod
    def of(cls, config: Any, tensor_parallel: int, itemsize: int) -> Shape:
        """Of a configuration of transformers.

        Raises:
            PlanError: layers with a window or a state, whose blocks are vLLM's; heads that cannot
                be divided.
        """
        text = config.get_text_config()
        if has_window_layers(text) or not has_only_attention(text):
            raise PlanError("layers that do not attend to all of the text: not planned yet")
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        if heads % tensor_parallel:
            raise PlanError(f"--tp {tensor_parallel}: {heads} heads cannot be divided by it")
        local = max(1, kv_heads // tensor_parallel)
        return cls(
            layers=text.num_hidden_layers,
            kv_heads=local,
            queries_per_kv=max(1, heads // tensor_parallel // local),
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            weight_bytes=_parameters(config) * itemsize // tensor_parallel,
        )

    def fit_seconds_per_token(self) -> float:
        """Of a compaction on an H200, by what one took there (any GPU of its speed)."""
        heads = self.layers * self.kv_heads
        return FIT_SECONDS_PER_TOKEN_AND_HEAD * heads * self.head_size / 128

    def token_bytes(self, itemsize: int) -> int:
        """Keys and values of a token, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * itemsize


def _parameters(config: Any) -> int:
    """How many a model of this configuration has, by building it without contents."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Plan:
    """A model in so much memory, for contexts of one length.

    Attributes:
        shape: of one rank.
        limits: the engine's.
        itemsize: bytes of a key's number.
        available: bytes of a rank for keys, values and what belongs to them.
        fit_bytes: of these, what is kept free for the temporaries of a fit; 0 on a CPU.
    """

    shape: Shape
    limits: EngineLimits
    itemsize: int
    available: int
    fit_bytes: int = 0

    @property
    def block_bytes(self) -> int:
        """A block in all layers."""
        return self.limits.block_size * self.shape.token_bytes(self.itemsize)

    @property
    def exact_pool(self) -> int:
        """Blocks of stock vLLM."""
        return max(0, self.available) // self.block_bytes

    @property
    def pool(self) -> int:
        """Blocks beside bias, page tables, query pool and the temporaries of a fit."""
        available = self.available - self.fit_bytes
        token = self.shape.token_bytes(self.itemsize)
        share = self.limits.bias_share(self.shape.layers * self.shape.kv_heads, token)
        usable = self.limits.kv_bytes(available, token, share)
        return max(0, usable) // self.block_bytes

    def exact_blocks(self, tokens: int) -> int:
        """That a sequence of so many tokens holds without compaction."""
        return ceil_div(tokens, self.limits.block_size)

    def held_blocks(self, prompt: int, generated: int = 0) -> int:
        """That a sequence holds when its prompt is compacted, and so much is generated.

        Where the threshold is a share of the pool: under as much pressure as there can be.
        """
        limits, free = self.limits, 1 << 30
        planner = Planner.of(limits, num_blocks=free)
        end = limits.protected_tokens
        blocks = 0
        while True:
            view = SequenceView(
                "",
                computed=prompt,
                prompt=prompt,
                compacted_end=end,
                exact_tokens=prompt - end + limits.protected_tokens,
                ratio=limits.config.ratio,
                threshold_tokens=limits.threshold.tokens,
                compacted_blocks=blocks,
            )
            if limits.threshold.tokens is not None:
                span = next(planner.spans([view], free), None)
            else:
                span = planner.next_span(view, free)
                shortest = planner.shortest_span(limits.config.ratio)
                if span is not None and span.end - span.start < shortest:
                    span = None
            if span is None:
                break
            blocks += planner.span_blocks(span.end - span.start, limits.config.ratio)
            end = span.end
        exact = limits.protected_tokens + prompt + generated - end
        return blocks + ceil_div(exact, limits.block_size)

    @property
    def fit_seconds(self) -> float:
        """That the fits of the longest context take on an H200, one after the other."""
        return self.limits.max_model_len * self.shape.fit_seconds_per_token()

    def with_ratio(self, ratio: float) -> Plan:
        """The same at another ratio."""
        config = replace(self.limits.config, ratio=ratio)
        return replace(self, limits=replace(self.limits, config=config))

    def ratio_for(self, sequences: int) -> float | None:
        """The gentlest ratio at which so many of the longest context fit; 1 where they fit without
        compaction, None where they never do."""
        if self.sequences[0] >= sequences:
            return 1.0
        fitting = (r for r in RATIOS_TO_TRY if self.with_ratio(r).sequences[1] >= sequences)
        return next(fitting, None)

    @property
    def peak_blocks(self) -> int:
        """That vLLM admits a sequence of the longest context with: before and while it is
        compacted, if it is compacted as it goes."""
        return ceil_div(self.limits.peak_tokens, self.limits.block_size)

    @property
    def sequences(self) -> tuple[int, int]:
        """Of the longest context, that fit without compaction, and compacted."""
        context = self.limits.max_model_len
        return self.exact_pool // self.exact_blocks(context), self.pool // self.held_blocks(context)


def make_plan(
    shape: Shape,
    available: int,
    *,
    context: int,
    itemsize: int,
    block_size: int,
    options: dict[str, Any],
    in_flight_tokens: int = 2 * BATCHED_TOKENS,
    fit_bytes: int = 0,
) -> Plan:
    """A plan from the options of ``--kv-compaction-config``.

    Raises:
        CompactionConfigError: the options are wrong, or nothing could ever be compacted by them.
    """
    config = CompactionConfig.from_dict(options)
    limits = EngineLimits(
        config=config,
        threshold=config.resolve_threshold(context, block_size),
        block_size=block_size,
        max_model_len=context,
        num_layers=shape.layers,
        kv_heads=shape.kv_heads,
        queries_per_kv=shape.queries_per_kv,
        head_size=shape.head_size,
        in_flight_tokens=in_flight_tokens,
        prefix_caching=True,
    )
    limits.check_use()
    return Plan(shape, limits, itemsize, available, fit_bytes)


def plan_of(
    model: str,
    *,
    context: str,
    memory: str,
    tensor_parallel: int,
    utilization: float,
    block_size: int,
    options: dict[str, Any],
) -> Plan:
    """A plan for GPUs, from a model's folder or name; see :func:`make_plan`.

    Raises:
        PlanError, CompactionConfigError: an argument is wrong; the message names it.
        OSError: there is no such model.
    """
    from transformers import AutoConfig

    tokens, total = parse_size(context), parse_size(memory, "b?")
    if tokens < 1:
        raise PlanError(f"--context {context}: expected at least one token")
    shape = Shape.of(AutoConfig.from_pretrained(model), tensor_parallel, ITEMSIZE)
    available = int(utilization * total) - shape.weight_bytes
    if available <= 0:
        raise PlanError(
            f"--memory {memory}: the weights alone take {shape.weight_bytes / 2**30:.1f} GiB of "
            "each GPU; raise it, or --tp"
        )
    return make_plan(
        shape,
        available,
        context=tokens,
        itemsize=ITEMSIZE,
        block_size=block_size,
        options=options,
        fit_bytes=gpu_fit_bytes(total),
    )
