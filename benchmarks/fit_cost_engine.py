"""One engine, one prompt, on one thread: how long it takes to read, and to compact.

echo '{"model": "/folder", "tokens": [...], "ratio": 0.1}' | python -m benchmarks.fit_cost_engine
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from unittest.mock import patch

#: Tokens of each answer: a compaction takes effect within a few steps.
ANSWER = 8
#: Runs of each kind, of which the first one is not counted.
TURNS = 3


def main(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of the step that reads the prompt, and those of its fits.

    Args:
        job: ``model``, a folder; ``tokens``, of the prompt; ``ratio``, None for stock vLLM.
    """
    from vllm import SamplingParams

    from vllm_am import LLM
    from vllm_am.compaction import sample_queries

    tokens, ratio = job["tokens"], job["ratio"]
    options = None
    if ratio is not None:
        # The whole fit in one step: what its parts cost beside each other is not the subject.
        options = {"ratio": ratio, "threshold": len(tokens) // 2, "step_ms": 1e6}
    llm = LLM(
        job["model"],
        kv_compaction=options,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=len(tokens) + 64,
        max_num_batched_tokens=len(tokens) + 64,
        max_num_seqs=4,
        enable_prefix_caching=False,  # every turn reads and compacts anew
        skip_tokenizer_init=True,
        seed=0,
    )
    engine = llm.llm_engine
    params = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True, detokenize=False)

    def turn(number: int) -> float:
        """Serve it once; seconds of the first step."""
        engine.add_request(str(number), {"prompt_token_ids": tokens}, params)
        first = None
        while engine.has_unfinished_requests():
            started = time.perf_counter()
            engine.step()
            first = first or time.perf_counter() - started
        assert first is not None
        return first

    found: dict[str, float] = {}
    if ratio is None:
        found["read"] = min([turn(number) for number in range(TURNS)][1:])
        return found
    totals = engine.engine_core.engine_core.scheduler.compaction.journal.totals
    for name, fewest in (("fit", sample_queries.FEWEST_QUERIES), ("fit, all queries", 1 << 30)):
        with patch.object(sample_queries, "FEWEST_QUERIES", fewest):
            seconds = []
            for number in range(TURNS):
                before = totals.compactions
                turn(number)
                assert totals.compactions == before + 1, "the prompt was not compacted"
                seconds.append(list(totals.seconds)[-1])
        found[name] = min(seconds[1:])
    return found


if __name__ == "__main__":
    result = main(json.load(sys.stdin))
    print()
    print(json.dumps(result))
