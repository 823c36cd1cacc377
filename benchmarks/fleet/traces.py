"""Requests: when they come, how long their prompts and answers are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Of the two rows of quantiles below.
LEVELS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Request:
    """One of a trace.

    Attributes:
        arrival: seconds from the beginning.
        prompt: tokens.
        output: tokens.
    """

    arrival: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Traffic:
    """A distribution of requests.

    Attributes:
        prompt: quantiles of its length in tokens, at :data:`LEVELS`.
        output: quantiles of the answer's.
        rate: requests per second, arriving independently (Poisson).
    """

    name: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    rate: float

    def requests(self, count: int, seed: int, longest: int) -> list[Request]:
        """The first ``count`` requests; prompts are cut so that no whole exceeds ``longest``."""
        random = np.random.default_rng(seed)
        arrivals = np.cumsum(random.exponential(1 / self.rate, count))
        lengths = (
            np.exp(np.interp(random.random(count), LEVELS, np.log(quantiles))).round().astype(int)
            for quantiles in (self.prompt, self.output)
        )
        return [
            Request(float(arrival), int(min(prompt, longest - output)), int(output))
            for arrival, prompt, output in zip(arrivals, *lengths, strict=True)
        ]


#: Computed from `FAST25-release/traces/conversation_trace.jsonl` of kvcache-ai/Mooncake (12,031
#: requests to Kimi in an hour, published with "Mooncake", FAST '25): lengths and rate. Prefixes
#: that its requests share are left out.
CONVERSATION = Traffic(
    "conversation",
    (891, 901, 964, 2306, 6909, 15367, 27367, 39550, 85400, 126195),
    (1, 10, 24, 156, 350, 472, 597, 698, 1119, 2000),
    3.4,
)

#: Ours: long documents with long answers (agents, reports), what compaction is for.
DOCUMENTS = Traffic(
    "documents",
    (8000, 12000, 16000, 24000, 36000, 56000, 80000, 96000, 112000, 120000),
    (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192),
    1.0,
)

#: Ours: short questions that models think about for long before they answer.
REASONING = Traffic(
    "reasoning",
    (200, 300, 400, 800, 1500, 3000, 6000, 8000, 12000, 16000),
    (1000, 2000, 3000, 6000, 10000, 16000, 24000, 32000, 48000, 64000),
    2.0,
)

TRAFFIC = {traffic.name: traffic for traffic in (CONVERSATION, DOCUMENTS, REASONING)}
