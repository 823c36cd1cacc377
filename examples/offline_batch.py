"""Offline: a batch of long documents, each with a question, without a server.

python examples/offline_batch.py MODEL [--question QUESTION] DOCUMENT [DOCUMENT ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm import SamplingParams

from vllm_am import LLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("documents", nargs="+", type=Path)
parser.add_argument("--question", default="What is this text about?")
parser.add_argument("--max-model-len", type=int, default=8192)
parser.add_argument("--enforce-eager", action="store_true", help="start sooner, run slower")


def main() -> None:
    """vLLM starts processes that import this file: nothing happens before this is called."""
    args = parser.parse_args()
    model = args.model
    prompts = [
        [{"role": "user", "content": f"{path.read_text()}\n\n{args.question}"}]
        for path in args.documents
    ]
    # --8<-- [start:llm]
    llm = LLM(
        model,
        kv_compaction={"ratio": "10x", "threshold": 1024},
        max_model_len=args.max_model_len,
        enforce_eager=args.enforce_eager,
    )
    answers = llm.chat(prompts, SamplingParams(max_tokens=64, temperature=0))
    # --8<-- [end:llm]
    for path, answer in zip(args.documents, answers, strict=True):
        print(f"{path.name}: {answer.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
