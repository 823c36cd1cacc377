"""The OpenAI client: options of a request go into ``extra_body``; the answer is streamed.

python examples/openai_client.py [--url URL] [--document FILE] [QUESTION]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question", nargs="?", default="What does the licence say about patents?")
parser.add_argument("--url", default="http://localhost:8000")
parser.add_argument("--document", type=Path, default=Path("LICENSE"))
args = parser.parse_args()

client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": f"{args.document.read_text()}\n\n{args.question}"}],
    max_tokens=64,
    temperature=0,
    stream=True,
    extra_body={"vllm_xargs": {"kv_compaction_ratio": "10x"}},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
