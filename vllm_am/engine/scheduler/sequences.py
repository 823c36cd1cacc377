"""What compaction knows of each request: its options, what the planner sees of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from vllm.v1.request import Request

from vllm_am.config import RequestOverrides
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.scheduler.blocks import CompactingManager
from vllm_am.engine.scheduler.planner import Planner, SequenceView, Span
from vllm_am.engine.scheduler.query_pool import Use
from vllm_am.engine.scheduler.recent_prompts import RecentPrompts

#: A ratio from here on gives no block back, so that such sequences are left alone. Tests raise it:
#: a compaction that keeps every key has to change nothing.
POINTLESS_RATIO = 1.0


@dataclass
class SequenceOptions:
    """What is kept per request while it is known to the scheduler."""

    enabled: bool
    forced: bool
    """See ``SequenceView``."""
    ratio: float
    threshold_tokens: int | None
    sample_rate: float
    """Share of the token positions whose queries are kept."""
    cache: bool
    """Whether it takes part in the cache of compacted prefixes: begins on others', leaves its own.

    Not one that wants log-probabilities of its prompt: vLLM computes all of that itself.
    """
    marked_end: int = 0
    """Where the prefix ends that it says others have, in whole blocks; 0: it says nothing."""
    not_before: int = 0
    """After a failed fit: tokens that must have been computed before it is tried again."""
    unmerged_end: int = 0
    """After a failed merge: end of its segments. It is tried again when there is another one."""
    outgrew: int = 0
    """How often it needed more than the whole pool because a fit had failed."""
    thin_until: int = 0
    """Its queries do not suffice: tokens to be computed before it is looked at again."""
    steps_left: int = 0
    """When it had passed its threshold and its prompt had been read: steps to its end."""
    refusal: str = ""
    """Why it is finished with an error as soon as possible."""


class Sequences:
    """The requests as compaction sees them.

    Args:
        draft_tokens: most tokens of a step that may yet be rolled back.
    """

    def __init__(
        self, limits: EngineLimits, planner: Planner, blocks: CompactingManager, draft_tokens: int
    ) -> None:
        self._limits = limits
        self._planner = planner
        self._blocks = blocks
        self._draft_tokens = draft_tokens
        self._recent_prompts = RecentPrompts()
        self.known: dict[str, SequenceOptions] = {}

    def options(self, request: Request) -> SequenceOptions:
        """The request's own options over those of the engine. Never raises, whatever it brings."""
        options = self.known.get(request.request_id)
        if options is None:
            options = self.known[request.request_id] = self._read(request)
        return options

    def _read(self, request: Request) -> SequenceOptions:
        """Wrong ones are the front ends' to refuse; one that passed all of them stays exact."""
        params = request.sampling_params
        overrides, refusal = RequestOverrides(), ""
        try:
            overrides = RequestOverrides.from_extra_args(params.extra_args if params else None)
            self._limits.check_request(
                overrides,
                request.num_prompt_tokens,
                request.num_prompt_tokens + request.max_tokens,
                self._planner.blocks_for_one,
            )
        except Exception as error:
            refusal = str(error) or type(error).__name__
        threshold = overrides.threshold_tokens or self._planner.threshold.tokens
        ratio = overrides.ratio or self._limits.config.ratio
        enabled = overrides.enabled and not refusal and ratio < POINTLESS_RATIO
        # Not around media either: no span may end within an image.
        enabled = enabled and not request.mm_features
        cache = enabled and self._limits.caches_prefixes and overrides.cache is not False
        cache = cache and not request.skip_reading_prefix_cache
        size = self._limits.block_size
        return SequenceOptions(
            enabled=enabled,
            forced=overrides.forced,
            ratio=ratio,
            threshold_tokens=threshold,
            sample_rate=self._limits.sample_rate(max(request.num_prompt_tokens, threshold or 0)),
            cache=cache,
            marked_end=(overrides.prefix_tokens or 0) // size * size if cache else 0,
            refusal=refusal,
        )

    def arrived(self, request: Request) -> None:
        """Its prompt is one of those that later ones may have something in common with."""
        if self.options(request).cache:
            self._recent_prompts.add(request.block_hashes)

    def _common_end(self, request: Request) -> int:
        """Where the text ends that its prompt has in common with others, in whole blocks."""
        size, hashed = self._limits.block_size, self._blocks.block_pool.hash_block_size
        hashes = request.block_hashes[: request.num_prompt_tokens // hashed]
        return self._recent_prompts.common(hashes) * hashed // size * size

    def view(self, request: Request) -> SequenceView | None:
        """What the planner sees; None while nothing of it is to be compacted."""
        options = self.options(request)
        if not options.enabled:
            return None
        # Certain tokens only: not the placeholders of async scheduling, nor unverified drafts.
        computed = (
            request.num_computed_tokens - request.num_output_placeholders - self._draft_tokens
        )
        if computed < options.not_before:
            return None
        segments = self._blocks.segments(request.request_id)
        protected = self._limits.protected_tokens
        end = segments[-1].end if segments else protected
        exact, steps = computed - end + protected, self._steps_left(request)
        if steps is not None and exact > (options.threshold_tokens or exact):
            options.steps_left = max(options.steps_left, steps)
        return SequenceView(
            request.request_id,
            computed=computed,
            prompt=request.num_prompt_tokens,
            compacted_end=end,
            exact_tokens=exact,
            ratio=options.ratio,
            threshold_tokens=options.threshold_tokens,
            compacted_blocks=sum(len(s.block_ids) for s in segments),
            marked_end=options.marked_end,
            common_end=partial(self._common_end, request) if options.cache else int,
            steps_left=steps,
            forced=options.forced,
        )

    def use_of_queries(self, request: Request) -> Use:
        """What the queries of its prompt are going to be of use for, as far as can be told."""
        options = self.options(request)
        prompt, limit = request.num_prompt_tokens, options.threshold_tokens
        segments = self._blocks.segments(request.request_id)
        exact = self.longest(request) - (segments[-1].end if segments else 0)
        if not options.enabled or (limit is not None and exact <= limit):
            return Use.PERHAPS
        if self.must_be_compacted(request):
            return Use.MUST
        tokens = min(prompt, self._planner.longest_span)
        slots = self._planner.span_slots(tokens, options.ratio)
        if self._planner.gains(tokens, slots, request.max_tokens, options.forced):
            return Use.OWN
        shared = options.cache and (options.marked_end or self._common_end(request))
        return Use.OTHERS if shared else Use.PERHAPS

    def must_be_compacted(self, request: Request) -> bool:
        """Whether the pool could not hold it otherwise, or some of it was compacted already."""
        blocks = self._planner.blocks_to_grow(self.longest(request))
        has_segments = bool(self._blocks.segments(request.request_id))
        return has_segments or blocks > self._planner.num_blocks

    def longest(self, request: Request) -> int:
        """Tokens that it may come to."""
        return min(request.num_prompt_tokens + request.max_tokens, self._limits.max_model_len)

    def _steps_left(self, request: Request) -> int | None:
        """See ``SequenceView``; None while its prompt is being read."""
        pending = request.num_output_placeholders
        if request.num_computed_tokens - pending < request.num_prompt_tokens:
            return None
        left = self.longest(request) - request.num_tokens
        # Where tokens are pending, so is what the workers report: async scheduling.
        return left - 2 * pending

    def merge_due(self, request: Request) -> Span | None:
        """All that was compacted of it, where its segments have outgrown ``merge_slots``."""
        segments = self._blocks.segments(request.request_id)
        if not segments:
            return None
        options = self.options(request)
        if not options.enabled or segments[-1].end <= options.unmerged_end:
            return None
        slots = sum(s.slots for s in segments)
        target = self._planner.merged_blocks(slots, sum(len(s.block_ids) for s in segments))
        if target is None:
            return None
        slots = target * self._limits.block_size
        return Span(request.request_id, segments[0].start, segments[-1].end, slots)

    def was_too_short(self, request: Request) -> bool:
        """Whether it has passed its threshold and was left exact, as its end, which was known,
        came too soon (``Planner.pays``)."""
        options = self.known.get(request.request_id)
        if options is None or not options.enabled or not request.is_finished():
            return False
        limit, tokens = options.threshold_tokens, request.num_tokens - self._planner.recent_tokens
        tried = options.not_before or options.thin_until
        if limit is None or request.num_tokens <= limit or tokens <= 0 or tried:
            return False
        if self._blocks.segments(request.request_id):
            return False
        tokens = min(tokens, self._planner.longest_span)
        slots = self._planner.span_slots(tokens, options.ratio)
        return not self._planner.gains(tokens, slots, options.steps_left, options.forced)

    def forget(self, request: Request) -> None:
        """It is finished, or preempted: then it will be computed anew, with the same options."""
        options = self.known.pop(request.request_id, None)
        if options is not None and not request.is_finished():
            self.known[request.request_id] = replace(options, not_before=0, unmerged_end=0)
