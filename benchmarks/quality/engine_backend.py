"""The real engine as a back end: one process per configuration, all of its ratios in it.

``run`` starts ``python -m benchmarks.quality.engine_backend``, which reads a job from standard
input, serves every conversation through ``vllm_am.LLM`` and prints what came out as JSON on its
last line. A configuration is whatever ``--kv-compaction-config`` takes.

A compaction takes effect two or three steps after the prefill. So the last ``MARGIN`` tokens of a
prompt are not prefilled but forced, like the suffix: when the first question comes, the document
has been compacted. Memory is the scheduler's own count of blocks.
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


class EngineError(RuntimeError):
    """The engine process failed; the message ends in its output."""


@dataclass(frozen=True)
class Result:
    """All conversations at one ratio. Errors are the engine's, on its held-out queries."""

    scores: list[SuffixScore]
    compactions: int
    failures: dict[str, int]
    blocks: float
    full_blocks: float
    output_error: float
    mass_error: float
    seconds: float


def run(
    model: Path,
    options: Mapping[str, Any],
    ratios: Sequence[float | None],
    conversations: Sequence[Conversation],
    mode: Mode,
    timeout: float = 3600,
) -> list[Result]:
    """Serve the conversations at every ratio; None is the full cache.

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
    }
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
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
        "layer_tokens_per_step": 1 << 40,
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


def _at_ratio(llm: Any, ratio: float | None, job: Mapping[str, Any]) -> Result:
    from vllm import SamplingParams

    from benchmarks.quality.forced_decoding import FORCED_TOKENS

    extra = {"kv_compaction": "off"} if ratio is None else {"kv_compaction_ratio": ratio}
    totals = llm.llm_engine.engine_core.engine_core.scheduler.compaction.totals
    before = asdict(totals)
    margin = job["margin"]
    prompts, parameters = [], []
    for prompt, suffix in job["conversations"]:
        cut = len(prompt) - margin
        forced = prompt[cut:] + suffix
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
                extra_args={**extra, FORCED_TOKENS: forced},
            )
        )
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    scores = []
    for output, (_, suffix) in zip(outputs, job["conversations"], strict=True):
        completion = output.outputs[0]
        found = list(zip(completion.token_ids, completion.logprobs, strict=True))[margin:]
        if [token for token, _ in found] != suffix:
            raise RuntimeError("the engine did not follow the forced tokens")
        entries = [by_token[token] for token, by_token in found]
        scores.append(SuffixScore([e.logprob for e in entries], [e.rank == 1 for e in entries]))
    after = asdict(totals)
    gained = {k: after[k] - before[k] for k in ("compactions", "blocks_freed")}
    full = sum(math.ceil(len(p) / BLOCK_SIZE) for p, _ in job["conversations"]) / len(scores)
    return Result(
        scores=scores,
        compactions=gained["compactions"],
        failures={
            reason: count - before["failures"].get(reason, 0)
            for reason, count in after["failures"].items()
            if count > before["failures"].get(reason, 0)
        },
        blocks=full - gained["blocks_freed"] / len(scores),
        full_blocks=full,
        output_error=_mean(after["output_errors"][len(before["output_errors"]) :]),
        mass_error=_mean(after["mass_errors"][len(before["mass_errors"]) :]),
        seconds=_mean(after["seconds"][len(before["seconds"]) :]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def main() -> None:
    print(json.dumps([asdict(result) for result in _serve(json.load(sys.stdin))]))


if __name__ == "__main__":
    main()
