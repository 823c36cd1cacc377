"""Numbers derived once from vLLM's configuration and ours, the same in every process."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vllm.config import VllmConfig

from vllm_am.compaction.pages import page_slots
from vllm_am.config import (
    CONFIG_KEY,
    LEAST_RATIO,
    PASS_SOURCES,
    PREFIX_TOKENS_FIELD,
    QUERY_SOURCES,
    CompactionConfig,
    CompactionConfigError,
    RequestOverrides,
    Threshold,
    shown,
)
from vllm_am.engine.footprint import Footprint, ceil_div
from vllm_am.engine.layers import full_layers, has_window_layers

#: Bytes of one slot's bias (float32) per layer and KV head.
BIAS_BYTES = 4

#: Bytes of an entry of a page table (int32): one per page of a compacted sequence.
PAGE_ID_BYTES = 4

#: Tokens x layers whose heads are fitted as one batch.
SLICE_TOKENS = 65536

#: Statistics of all heads of a rank that are kept from the measurement to the fit; larger ones are
#: computed twice.
KEPT_STATISTICS_BYTES = 256 << 20

#: Where a worker may put a fit aside in the middle of a head.
PAUSING_DEVICES: tuple[str, ...] = ("cpu",)

#: Positions at the end of a prompt that are always sampled: the question, where there is one.
PROMPT_TAIL_POSITIONS = 64

#: Share of the KV pool's positions that the queries of a second sequence are worth.
SMALL_POOL_SHARE = 1 / 8


@dataclass(frozen=True)
class EngineLimits:
    """What scheduler, workers and startup checks must agree on (tokens unless said otherwise)."""

    config: CompactionConfig
    threshold: Threshold
    block_size: int
    max_model_len: int
    num_layers: int
    """Layers of one pipeline stage that are compacted."""
    kv_heads: int
    """Of one layer and rank."""
    queries_per_kv: int
    """Query heads per KV head (the GQA group size)."""
    head_size: int
    in_flight_tokens: int
    prefix_caching: bool = False
    """Whether vLLM caches exact prefixes."""
    device_type: str = "cuda"
    """PyTorch's name of what the workers run on."""
    ranks: int = 1
    """Workers of one engine."""
    window_layers: bool = False
    """Whether there are layers beside them that hold a window of the text, in blocks of their own.
    """
    state_layers: bool = False
    """Whether there are layers beside them, or parts of them, that hold a state of the text."""

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> EngineLimits:
        """Raises :class:`~vllm_am.config.CompactionConfigError` for options the model rules out:
        budgets of other heads, whatever leaves nothing to be compacted.
        """
        config = CompactionConfig.from_dict(vllm_config.additional_config[CONFIG_KEY])
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        layers = full_layers(model.hf_text_config)
        config.check_heads(layers, model.get_total_num_kv_heads())
        block_size = vllm_config.cache_config.block_size
        heads, kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
        limits = cls(
            config=config,
            threshold=config.resolve_threshold(model.max_model_len, block_size),
            block_size=block_size,
            max_model_len=model.max_model_len,
            # On average; a stage without any has nothing to do in the slices of the others.
            num_layers=max(1, len(layers) // parallel.pipeline_parallel_size),
            kv_heads=kv_heads,
            queries_per_kv=max(1, heads // kv_heads),
            head_size=model.get_head_size(),
            in_flight_tokens=vllm_config.max_in_flight_tokens,
            prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
            ranks=parallel.world_size,
            device_type=vllm_config.device_config.device_type,
            window_layers=has_window_layers(model.hf_text_config),
            state_layers=model.is_hybrid,
        )
        limits.check_passes()
        limits.check_cache()
        limits.check_use()
        return limits

    @property
    def caches_prefixes(self) -> bool:
        """Whether compacted prefixes are shared by all sequences that begin with them.

        They are kept in vLLM's prefix cache. A merge would need reference queries of a prefix that
        nobody has read again. Layers with a window would need theirs as it was behind the prefix,
        and layers with a state that one.
        """
        possible = self.prefix_caching and self.config.merge_slots is None
        others = self.window_layers or self.state_layers
        return possible and not others and self.config.cache != "off"

    def check_passes(self) -> None:
        """Refuse query sources that go on behind a span, where that needs a state.

        Raises:
            CompactionConfigError: naming those that need none.
        """
        if self.state_layers and self.config.pass_fraction:
            without = ", ".join(source for source in QUERY_SOURCES if source not in PASS_SOURCES)
            raise CompactionConfigError(
                f"--kv-compaction-config queries={shown(self.config.queries)}: on models with "
                "state-space or linear-attention layers nothing can be read behind a span, as "
                f"their state there is not kept; use {without}"
            )

    def check_cache(self) -> None:
        """Refuse a cache that is asked for where there can be none.

        Raises:
            CompactionConfigError: naming the option that stands in the way.
        """
        if self.config.cache != "on" or self.caches_prefixes:
            return
        if self.window_layers or self.state_layers:
            others = "sliding-window" if self.window_layers else "state-space or linear-attention"
            raise CompactionConfigError(
                "--kv-compaction-cache=on: compacted prefixes cannot be shared on models with "
                f"{others} layers yet; drop it"
            )
        other = "merge_slots" if self.prefix_caching else "--no-enable-prefix-caching"
        raise CompactionConfigError(
            f"--kv-compaction-cache=on: compacted prefixes cannot be shared with {other}; "
            "drop one of the two"
        )

    def check_use(self) -> None:
        """Refuse options by which no sequence could ever be compacted.

        Raises:
            CompactionConfigError: naming the option that stands in the way.
        """
        footprint, tokens, ratio = self.footprint, self.max_model_len, self.config.ratio
        if footprint.compacts(ratio, tokens):
            return
        # By itself, the option that would do if it had its least (or largest) value.
        relaxed: dict[str, tuple[Footprint, float]] = {
            "config recent_tokens": (replace(footprint, recent_tokens=1), ratio),
            "config protected_tokens": (replace(footprint, protected_tokens=0), ratio),
            "config min_span_tokens": (replace(footprint, min_span_tokens=1), ratio),
            "config max_span_tokens": (replace(footprint, max_span_tokens=tokens), ratio),
            "ratio": (footprint, LEAST_RATIO),
        }
        helps = [name for name, way in relaxed.items() if way[0].compacts(way[1], tokens)]
        # One that the user has set before one that has its default.
        helps.sort(key=lambda name: self._is_default(name.rpartition(" ")[2]))
        option = helps[0] if helps else "threshold"
        value = getattr(self.config, option.rpartition(" ")[2])
        raise CompactionConfigError(
            f"--kv-compaction-{option}={shown(value)}: no sequence of up to {tokens} tokens "
            f"(--max-model-len) could ever be compacted: its first {self.protected_tokens} and "
            f"last {self.config.recent_tokens} tokens stay exact, a span has up to "
            f"{footprint.longest_span}, and whole blocks of {self.block_size} must come free; "
            f"{'raise' if 'max_span' in option else 'lower'} it"
        )

    def _is_default(self, option: str) -> bool:
        return bool(getattr(self.config, option) == getattr(CompactionConfig(), option))

    @property
    def page_slots(self) -> int:
        """Slots of a page, of which one head's share of a block is made."""
        return page_slots(self.block_size)

    @property
    def footprint(self) -> Footprint:
        """What a sequence needs that is compacted by these options."""
        return Footprint(
            threshold=self.threshold,
            block_size=self.block_size,
            recent_tokens=self.config.recent_tokens,
            min_span_tokens=self.config.min_span_tokens,
            max_span_tokens=self.config.max_span_tokens,
            protected_tokens=self.protected_tokens,
            in_flight_tokens=self.in_flight_tokens,
            shares=self.caches_prefixes,
        )

    def blocks_needed(self, overrides: RequestOverrides, tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` needs at its peak, compacted as it asks to be."""
        tokens = min(tokens, self.max_model_len)
        if overrides.enabled and self.config.max_error is None:
            footprint = self.footprint
            if overrides.threshold_tokens is not None:
                footprint = replace(footprint, threshold=Threshold(overrides.threshold_tokens))
            tokens = footprint.peak_tokens(overrides.ratio or self.config.ratio, tokens)
        return ceil_div(tokens, self.block_size)

    def check_request(
        self, overrides: RequestOverrides, prompt: int | None, tokens: int, num_blocks: int
    ) -> None:
        """Refuse a request whose own options are useless, or let it outgrow the whole KV pool.

        vLLM's startup check makes sure that any request fits; with ``"off"`` or a larger ratio one
        may not, and would be preempted and computed again for ever.

        Args:
            prompt: tokens of it; None: not known yet.
            tokens: prompt and longest output together.
            num_blocks: usable blocks of the pool.

        Raises:
            CompactionConfigError: naming the field.
        """
        if overrides == RequestOverrides():
            return
        self._check_sharing(overrides, prompt)
        if overrides.threshold_tokens is not None:
            self.config.check_threshold(
                overrides.threshold_tokens, self.block_size, "kv_compaction_threshold"
            )
        needed = self.blocks_needed(overrides, tokens)
        if needed > num_blocks:
            if not overrides.enabled:
                field = "kv_compaction"
            elif overrides.ratio is not None:
                field = "kv_compaction_ratio"
            else:
                field = "kv_compaction_threshold"
            raise CompactionConfigError(
                f"{field}: with this option a request of {tokens} tokens (prompt and max_tokens) "
                f"may need {needed} KV blocks, and the pool has {num_blocks}; lower max_tokens, or "
                "drop it"
            )

    def _check_sharing(self, overrides: RequestOverrides, prompt: int | None) -> None:
        """What is asked of the cache of compacted prefixes; raises CompactionConfigError."""
        if overrides.cache and not self.caches_prefixes:
            raise CompactionConfigError(
                "kv_compaction_cache='on': this server shares no compacted prefixes; drop it"
            )
        marked = overrides.prefix_tokens
        if marked is None:
            return
        field = f"{PREFIX_TOKENS_FIELD}={marked}"
        if not self.caches_prefixes:
            raise CompactionConfigError(
                f"{field}: this server shares no compacted prefixes; drop it"
            )
        if overrides.cache is False or not overrides.enabled:
            other = "kv_compaction" if not overrides.enabled else "kv_compaction_cache"
            raise CompactionConfigError(f"{field}: has no effect with {other}='off'; drop one")
        if prompt is not None and marked > prompt:
            raise CompactionConfigError(
                f"{field}: the prompt has {prompt} tokens; lower it to where the part ends that "
                "other prompts have, too"
            )
        ratio = overrides.ratio or self.config.ratio
        least = self.protected_tokens + self.footprint.shortest_prefix(ratio)
        if marked < least:
            raise CompactionConfigError(
                f"{field}: a prefix of fewer than {least} tokens is not worth compacting with "
                "these options; drop it"
            )

    @property
    def peak_tokens(self) -> int:
        """See :meth:`Footprint.peak_tokens`. With an error bound a sequence may stay exact."""
        if self.config.max_error is not None:
            return self.max_model_len
        return self.footprint.peak_tokens(self.config.ratio, self.max_model_len)

    @property
    def protected_tokens(self) -> int:
        """The protected prefix, in whole blocks."""
        return ceil_div(self.config.protected_tokens, self.block_size) * self.block_size

    @property
    def pauses_fits(self) -> bool:
        """Whether a worker puts a fit aside when its time in a step is up.

        Else the scheduler's slices are what a step does: on a GPU, where a head takes milliseconds;
        and where several ranks have to say in the same step that a fit is done.
        """
        return self.device_type in PAUSING_DEVICES and self.ranks == 1

    @property
    def heads(self) -> int:
        """KV heads that are compacted, of one rank: all layers."""
        return self.num_layers * self.kv_heads

    def heads_at_once(self, tokens: int, slots: int) -> int:
        """Heads that a fit takes on as one batch, in whole layers, of batches that are as large as
        one another: what bounds its memory.

        Args:
            tokens: of the span.
            slots: per head, on average.
        """
        # The Gram matrices cost ``4 n t^2`` operations where the statistics cost ``4 n T d``, and
        # take memory likewise: ``t`` slots count like ``t^2 / d`` more tokens.
        size = tokens + slots * slots // self.head_size
        batches = ceil_div(self.num_layers * size, SLICE_TOKENS)
        return ceil_div(self.num_layers, batches) * self.kv_heads

    def keeps_statistics(self, queries: int, tokens: int) -> bool:
        """Whether what is measured of all heads is kept for their fits.

        Args:
            queries: of each head.
            tokens: of the span.
        """
        floats = queries * (self.head_size + 1) + tokens
        return 4 * floats * self.heads <= KEPT_STATISTICS_BYTES

    @property
    def sample_positions(self) -> int:
        """Token positions that give ``reference_queries`` queries per KV head."""
        return ceil_div(self.config.reference_queries, self.queries_per_kv)

    def sample_rate(self, tokens: int) -> float:
        """Share of the token positions whose queries are kept, for a sequence of ``tokens``.

        All of them up to ``reference_queries``: what a later question looks for is often looked
        for at few positions of the text itself, and a sparser sample misses it.
        """
        return min(1.0, self.sample_positions / max(1, tokens))

    @property
    def positions_of_one(self) -> int:
        """Positions in the query pool of one sequence and of its passes, at most."""
        passes = math.ceil(self.config.pass_fraction * self.sample_positions)
        return min(self.sample_positions + PROMPT_TAIL_POSITIONS, self.max_model_len) + passes

    def query_pool_positions(self, num_blocks: int) -> int:
        """Token positions the query pool holds: its share of the KV pool's, but enough for one.

        For two, where that is a small part of the KV pool's: while one is fitted the next is read.
        """
        pool_tokens = num_blocks * self.block_size
        one = min(self.positions_of_one, pool_tokens)
        two = min(2 * self.positions_of_one, int(SMALL_POOL_SHARE * pool_tokens))
        return max(one, two, int(self.config.query_pool_share * pool_tokens))

    def bias_share(self, heads: int, bytes_per_token: float) -> float:
        """Bytes of bias and page tables per byte of keys and values.

        Args:
            heads: KV heads of all layers of the rank that are compacted.
            bytes_per_token: keys and values of one token in these layers.
        """
        return heads * (BIAS_BYTES + PAGE_ID_BYTES / self.page_slots) / bytes_per_token

    def kv_bytes(self, available: int, bytes_per_token: float, bias_share: float) -> int:
        """What is left for keys and values of ``available`` bytes, beside bias and query pool.

        Args:
            available: bytes that vLLM would give to the KV cache.
            bytes_per_token: keys and values of one token, all layers of the rank.
            bias_share: bytes of the bias of one slot per byte of its key and value.
        """
        query_share = self.queries_per_kv / 2  # bytes of a position's queries per bytes_per_token
        one = self.positions_of_one * query_share * bytes_per_token

        def beside(positions_share: float, fixed: float) -> float:
            return (available - fixed) / (1 + bias_share + positions_share * query_share)

        for_two = max(beside(0, 2 * one), beside(SMALL_POOL_SHARE, 0))
        return int(min(beside(self.config.query_pool_share, 0), beside(0, one), for_two))
