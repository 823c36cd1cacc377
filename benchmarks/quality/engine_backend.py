"""The real engine as a back end: one process per configuration, all of its ratios in it.

``run`` starts ``python -m benchmarks.quality.engine_backend``, which reads a job from standard
input, serves every conversation through ``vllm_am.LLM`` and prints what came out as JSON on its
last line. A configuration is whatever ``--kv-compaction-config`` takes.

A compaction takes effect two or three steps after the prefill. So the last ``MARGIN`` tokens of a
prompt are not prefilled but forced, like the suffix: when the first question comes, the document
has been compacted. To be compacted in rounds, as a sequence is that grows, a document is forced
from early on. Memory is the scheduler's own count of blocks.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fresh_process import run_fresh
from benchmarks.quality.conversations import Conversation, Mode, SuffixScore

#: Tokens of the prompt that are read one by one while the compaction takes place.
MARGIN = 8
#: The CPU back end of vLLM supports no smaller blocks.
BLOCK_SIZE = 32
#: Key in ``SamplingParams.extra_args``: tokens of the prompt, read and forced.
PROMPT_TOKENS = "prompt_tokens"


class EngineError(RuntimeError):
    """The engine process failed; the message ends in its output."""


@dataclass(frozen=True)
class Result:
    """All conversations at one ratio. Errors are the engine's, on its held-out queries.

    Attributes:
        held: KV blocks of each prompt at the end.
        blocks: their mean; full_blocks: that of the full cache.
    """

    scores: list[SuffixScore]
    compactions: int
    merges: int
    failures: dict[str, int]
    held: list[int]
    blocks: float
    full_blocks: float
    output_error: float
    mass_error: float
    seconds: float


def run(
    model: Path,
    options: Mapping[str, Any],
    ratios: Sequence[float | Sequence[float] | None],
    conversations: Sequence[Conversation],
    mode: Mode,
    timeout: float = 3600,
    prefilled: int | None = None,
    kv_gib: int = 1,
) -> list[Result]:
    """Serve the conversations at every ratio; None is the full cache.

    Args:
        ratios: of all conversations, or of each of them.
        prefilled: tokens of each prompt that are read at once. The others are forced one by one,
            and compaction ends with them. None: all but the margin.
        kv_gib: KV pool, in GiB; conversations that it cannot hold all are compacted as they are
            read, in shorter spans.

    Raises:
        EngineError: the process failed.
    """
    job = {
        "model": str(model),
        "options": dict(options),
        "ratios": list(ratios),
        "conversations": [(c.prompt, c.suffix) for c in conversations],
        # In a prompt, the question has to be read together with the document.
        "margin": MARGIN if mode is Mode.AFTER else 0,
        "prefilled": prefilled,
    }
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_LOGGING_LEVEL": "WARNING",
        **os.environ,
        # The scheduler's counts are read in this process.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    try:
        results = run_fresh("benchmarks.quality.engine_backend", job, environment, timeout)
    except RuntimeError as error:
        raise EngineError(f"{dict(options)}: {error}") from None
    return [
        Result(**{**result, "scores": [SuffixScore(**score) for score in result["scores"]]})
        for result in results
    ]


def _serve(job: Mapping[str, Any]) -> list[Result]:
    """The work of the process."""
    # Not at the top: the caller needs no vLLM.
    from benchmarks.quality.forced_decoding import ForcedTokens
    from vllm_am import LLM

    longest = max(len(prompt) + len(suffix) for prompt, suffix in job["conversations"])
    shortest = min(len(prompt) for prompt, _ in job["conversations"])
    options = {
        # Every prompt is over it, the exact rest of a compacted sequence and its suffix are not.
        "threshold": shortest - job["margin"] - 1,
        # All of a fit in the step in which it is due: what is measured are compacted caches.
        "step_ms": 1e6,
        **job["options"],
    }
    llm = LLM(
        job["model"],
        kv_compaction=options,
        logits_processors=[ForcedTokens],
        max_model_len=longest + 64,
        block_size=BLOCK_SIZE,
        dtype="float32",
        enforce_eager=True,
        seed=0,
    )
    try:
        return [_at_ratio(llm, ratio, job) for ratio in job["ratios"]]
    finally:
        llm.llm_engine.engine_core.shutdown()


def _at_ratio(llm: Any, ratio: float | list[float] | None, job: Mapping[str, Any]) -> Result:
    from vllm import SamplingParams

    from benchmarks.quality.forced_decoding import FORCED_TOKENS

    totals = llm.llm_engine.engine_core.engine_core.scheduler.compaction.journal.totals
    before = asdict(totals)
    conversations = job["conversations"]
    each = ratio if isinstance(ratio, list) else [ratio] * len(conversations)
    prompts, parameters = [], []
    for own, (prompt, suffix) in zip(each, conversations, strict=True):
        cut = job["prefilled"] or len(prompt) - job["margin"]
        forced = prompt[cut:] + suffix
        wish = {"kv_compaction": "off"} if own is None else {"kv_compaction_ratio": own}
        # A salt per ratio: otherwise a later ratio would find the prompt in the prefix cache. That
        # is harmless, but a prefill that is shared would also share the time it takes.
        prompts.append({"prompt_token_ids": prompt[:cut], "cache_salt": str(ratio)})
        parameters.append(
            SamplingParams(
                max_tokens=len(forced),
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                extra_args={**wish, FORCED_TOKENS: forced, PROMPT_TOKENS: len(prompt)},
            )
        )
    outputs, freed = _generate(llm, prompts, parameters, in_rounds=job["prefilled"] is not None)
    scores = []
    for output, (_, suffix) in zip(outputs, conversations, strict=True):
        completion = output.outputs[0]
        found = list(zip(completion.token_ids, completion.logprobs, strict=True))[-len(suffix) :]
        if [token for token, _ in found] != suffix:
            raise RuntimeError("the engine did not follow the forced tokens")
        entries = [by_token[token] for token, by_token in found]
        scores.append(SuffixScore([e.logprob for e in entries], [e.rank == 1 for e in entries]))
    after = asdict(totals)
    full = [math.ceil(len(prompt) / BLOCK_SIZE) for prompt, _ in conversations]
    held = [blocks - less for blocks, less in zip(full, freed, strict=True)]
    return Result(
        scores=scores,
        compactions=after["compactions"] - before["compactions"],
        merges=after["merges"] - before["merges"],
        failures={
            reason: count - before["failures"].get(reason, 0)
            for reason, count in after["failures"].items()
            if count > before["failures"].get(reason, 0)
        },
        held=held,
        blocks=_mean(held),
        full_blocks=_mean(full),
        output_error=_mean(after["output_errors"][len(before["output_errors"]) :]),
        mass_error=_mean(after["mass_errors"][len(before["mass_errors"]) :]),
        seconds=_mean(after["seconds"][len(before["seconds"]) :]),
    )


def _generate(
    llm: Any, prompts: Sequence[Any], parameters: Sequence[Any], in_rounds: bool
) -> tuple[list[Any], list[int]]:
    """As ``LLM.generate``; and the blocks that compaction has saved in each sequence.

    Args:
        in_rounds: a sequence is compacted no more when its prompt is complete.
    """
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    for index, (prompt, params) in enumerate(zip(prompts, parameters, strict=True)):
        engine.add_request(str(index), prompt, params)
    finished: dict[str, Any] = {}
    freed = dict.fromkeys(map(str, range(len(prompts))), 0)
    while engine.has_unfinished_requests():
        for request in scheduler.running:
            if request.request_id in scheduler.passes:
                continue
            segments = scheduler.compaction.blocks.segments(request.request_id)
            tokens = sum(segment.end - segment.start for segment in segments)
            blocks = sum(len(segment.block_ids) for segment in segments)
            # The engine appends something random to the names of requests.
            freed[request.request_id.split("-")[0]] = tokens // BLOCK_SIZE - blocks
            complete = (
                request.num_computed_tokens >= request.sampling_params.extra_args[PROMPT_TOKENS]
            )
            if in_rounds and complete:
                scheduler.compaction.sequences.known[request.request_id].enabled = False
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return [finished[name] for name in freed], list(freed.values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def main() -> None:
    print(json.dumps([asdict(result) for result in _serve(json.load(sys.stdin))]))


if __name__ == "__main__":
    main()
