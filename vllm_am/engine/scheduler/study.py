"""A study: all reference passes of one sequence before one compaction of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_am.engine.scheduler.planner import Span
from vllm_am.engine.scheduler.query_sources import PassPlan


@dataclass
class Study:
    """All reference passes of one sequence before one compaction of it."""

    parent: Request
    span: Span
    """What is going to be compacted. The passes see the parent's tokens [0, end) of it."""
    target_blocks: int
    """Blocks that its compaction will need: passes leave them free."""
    waiting: deque[PassPlan]
    windows: list[list[KVCacheBlock]] = field(default_factory=list)
    """By group of layers with a window, what of it they need at the end of the span: held until the
    study is over, as the parent's own window moves on."""
    together: list[PassPlan] = field(default_factory=list)
    """On-policy: what is read in one step, once nothing is waiting or running."""
    in_step: list[str] = field(default_factory=list)
    """On-policy: the passes that were started to be read in this step."""
    running: dict[str, PassPlan] = field(default_factory=dict)
    owners: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """By source: owners in the query pool of what its passes left there."""
    started: int = 0
    idle_steps: int = 0
    cut_short: bool = False
    """Some of the passes did not run to their end."""

    @property
    def end(self) -> int:
        return self.span.end

    @property
    def over(self) -> bool:
        return not self.waiting and not self.running and not self.together
