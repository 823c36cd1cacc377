"""Finds the heads that copy, before anything is served: random tokens are read twice.

The worker hands itself the step of a scheduler that has one request, as vLLM's own warm-up does
(``v1.worker.gpu.warmup``), so that the pass goes through everything that serves: both model
runners, tensor and pipeline parallelism, any attention path. Every rank looks at its own heads.

vLLM symbols touched: ``v1.core.sched.output.SchedulerOutput`` and ``NewRequestData`` (made), the
worker's ``execute_model`` and ``sample_tokens`` (called).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from vllm_am.compaction.copying_heads import (
    LEAST_COPIED_TOKENS,
    copying_scores,
    head_weights,
    tokens_to_copy,
)
from vllm_am.compaction.pages import read_pages
from vllm_am.engine.footprint import ceil_div
from vllm_am.engine.messages import STEP_ATTRIBUTE, CompactionStep, QuerySample
from vllm_am.engine.worker.state import WorkerState, head_names

logger = init_logger("vllm.kv_compaction")

REQUEST_ID = "kv-compaction::copying-pass"
#: Heads that the log names.
NAMED_HEADS = 5


def find_head_weights(
    execute: Callable[[SchedulerOutput], Any],
    sample: Callable[[Any], Any],
    state: WorkerState,
    vllm_config: VllmConfig,
) -> torch.Tensor | None:
    """What the scores of each head count for in budgets (``compaction.copying_heads``).

    Args:
        execute: the worker's ``execute_model``; nothing else may be under way.
        sample: its ``sample_tokens``.

    Returns:
        float64 [heads of this rank]; None where the engine is too small to tell: all alike.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    pool, blocks = len(state.fitting.queries[0]), next(iter(state.layers.values())).kv_cache
    block_size = state.kv.block_size
    # Block 0 is vLLM's null block.
    room = min(
        scheduler.max_num_batched_tokens,
        model.max_model_len - 1,
        (blocks.shape[0] - 1) // len(state.block_sizes) * block_size,
        2 * pool,
    )
    vocabulary = model.get_vocab_size()
    first = getattr(model.hf_text_config, "bos_token_id", None)
    # Configurations name tokens that the model does not have.
    first = first if isinstance(first, int) and 0 <= first < vocabulary else None
    beginning, *copied = tokens_to_copy(vocabulary, room, first)
    if len(copied) < LEAST_COPIED_TOKENS:
        return None
    tokens = [beginning, *copied, *copied]
    counts = [ceil_div(len(tokens), size) for size in state.block_sizes]
    begins = accumulate(counts, initial=1)
    by_group = [list(range(begin, begin + n)) for begin, n in zip(begins, counts, strict=False)]
    block_ids = by_group[state.group]
    slots = np.arange(len(copied))
    execute(_step(tokens, by_group, QuerySample(slots + 1 + len(copied), slots)))
    sample(None)
    ended = SchedulerOutput.make_empty()
    ended.finished_req_ids = {REQUEST_ID}
    execute(ended)

    heads = state.kv.num_kv_heads
    pages = state.kv.block_pages(block_ids).to(state.kv.pages.device)
    found = []
    for layer, queries in enumerate(state.fitting.queries):
        keys, _ = read_pages(state.kv, pages[layer * heads : (layer + 1) * heads])
        second = queries[: len(copied)].unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        found.append(copying_scores(second, keys[:, : len(tokens)], state.fitting.scale))
        queries[: len(copied)] = 0
    state.kv.pages[pages] = 0
    scores = torch.cat(found)
    weights = head_weights(scores)
    _say(scores, int((weights > 1).sum()), head_names(state.layers, vllm_config))
    return weights


def _step(tokens: list[int], block_ids: list[list[int]], sample: QuerySample) -> SchedulerOutput:
    """The step of a scheduler in which one request is read, and nothing else happens.

    Args:
        block_ids: of the request, by KV cache group.
    """
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [
        NewRequestData(
            req_id=REQUEST_ID,
            prompt_token_ids=tokens,
            mm_features=[],
            sampling_params=SamplingParams(max_tokens=1, temperature=0, detokenize=False),
            pooling_params=None,
            block_ids=tuple(block_ids),
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=tokens,
        )
    ]
    output.num_scheduled_tokens = {REQUEST_ID: len(tokens)}
    output.total_num_scheduled_tokens = len(tokens)
    setattr(output, STEP_ATTRIBUTE, CompactionStep(samples={REQUEST_ID: sample}))
    return output


def _say(scores: torch.Tensor, copying: int, names: list[str]) -> None:
    """Which heads they are, in the log."""
    best = scores.topk(min(NAMED_HEADS, copying)).indices.tolist()
    most = ", ".join(f"{names[head]} ({scores[head]:.2f})" for head in best)
    logger.info(
        "KV compaction: %d of %d KV heads look up and copy, and their keys count for more%s",
        copying,
        len(scores),
        f": {most}{', ...' if copying > len(best) else ''}" if most else "",
    )
