"""Many questions about one contract: it is read and compacted once, whoever asks.

python examples/many_questions.py [--url URL] [--document FILE] [QUESTION ...]

Start the server with ``--enable-prompt-tokens-details`` to see how much of each prompt was there.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

QUESTIONS = (
    "Who is a Contributor?",
    "May the work be used for business?",
    "What happens to the licence of those who sue over patents?",
    "Does the licence grant the use of trade names?",
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("questions", nargs="*", default=QUESTIONS)
parser.add_argument("--url", default="http://localhost:8000")
parser.add_argument("--document", type=Path, default=Path("LICENSE"))
args = parser.parse_args()

client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
model = client.models.list().data[0].id
contract = args.document.read_text()


# --8<-- [start:ask]
def ask(question: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were there already."""
    answer = client.chat.completions.create(
        model=model,
        # The document stands in front: that is what questions share.
        messages=[
            {"role": "system", "content": contract},
            {"role": "user", "content": question},
        ],
        max_tokens=64,
        temperature=0,
        # The first message is what others begin with, too: its span ends there.
        extra_body={"vllm_xargs": {"kv_compaction_prefix": "messages:1"}},
    )
    known = answer.usage.prompt_tokens_details
    return answer.choices[0].message.content or "", (known and known.cached_tokens) or 0


first, *others = args.questions
with ThreadPoolExecutor() as together:
    answers = [ask(first), *together.map(ask, others)]
# --8<-- [end:ask]

for question, (answer, cached) in zip(args.questions, answers, strict=True):
    print(f"{question} [{cached:,} tokens were there]\n  {answer.strip()}")
