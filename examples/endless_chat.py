"""A chat that never ends: the history grows, what it holds does not grow with it.

python examples/endless_chat.py [--url URL] < one line per turn

Each turn sends the whole history, as any chat client does. The part of it that was compacted in
earlier turns is found again; after each turn a line says what the server holds.
"""

from __future__ import annotations

import argparse
import sys

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://localhost:8000")
args = parser.parse_args()

client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
model = client.models.list().data[0].id


def total(name: str) -> int:
    """One of the server's metrics, over all engines."""
    families = text_string_to_metric_families(httpx.get(f"{args.url}/metrics").text)
    return int(sum(s.value for f in families for s in f.samples if s.name == name))


history = []
for line in sys.stdin:
    history.append({"role": "user", "content": line.strip()})
    answer = client.chat.completions.create(model=model, messages=history, max_tokens=64)
    text = answer.choices[0].message.content or ""
    history.append({"role": "assistant", "content": text})
    print(text.strip())
    print(
        f"  [{answer.usage.prompt_tokens:,} tokens of history; so far "
        f"{total('vllm:kv_compaction_compactions_total')} compactions, "
        f"{total('vllm:kv_compaction_cache_hit_tokens_total'):,} tokens found compacted]"
    )
