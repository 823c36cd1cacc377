"""What a model gives back of which some layers are compacted and others hold something else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.engine import driver

LENGTHS = (700, 1100, 1500)


def check_a_quarter(model: Path, block: int) -> list[int]:
    """At ratio 1/4 the blocks of the formula are freed, of the layers that are compacted.

    Args:
        block: tokens of one, where 32 were asked for.

    Returns:
        by request, most blocks that it holds at its end in another group of layers.
    """
    rng = random.Random(0)
    asks = [driver.Ask(driver.random_prompt(rng, n), 24) for n in LENGTHS]
    held = {}

    def look(engine: driver.Engine, _: int) -> None:
        blocks = engine.scheduler.compaction.blocks
        for name in blocks.req_to_blocks:
            most = max(
                sum(not b.is_null for b in other.req_to_blocks.get(name, ()))
                for other in blocks.others
            )
            held[name.partition("-")[0]] = blocks.held_blocks(name), most

    compaction: dict[str, Any] = {
        **{"ratio": 0.25, "threshold": 256, "recent_tokens": 32, "budgets": "global"},
        "query_pool_share": 1.0,  # all of them are read at once
    }
    with driver.start(model, compaction, enable_prefix_caching=False) as engine:
        engine.before_step = look
        engine.run(asks)
        assert engine.totals.compactions == len(LENGTHS) and not engine.totals.failures
    freed = 0
    for index, length in enumerate(LENGTHS):
        # Behind the protected block, before the recent ones.
        span = (length - 32) // block * block - block
        target = -(-span // 4 // block)
        freed += span // block - target
        assert held[str(index)][0] == -(-(length + 23) // block) - span // block + target
    assert engine.totals.blocks_freed == freed
    return [held[str(index)][1] for index in range(len(LENGTHS))]
