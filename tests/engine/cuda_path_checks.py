"""The GPU backend's metadata and forward pass on CPU tensors: run by test_cuda_path.py.

In a process of its own, since Triton decides when a kernel is imported whether it is interpreted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import tests.engine.cuda_on_cpu  # noqa: F401  isort: skip  (before Triton is imported)

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn

from tests.engine.models import make_random_model
from vllm_am.compaction.attend_pages import PagedRow, attend_pages, group_rows
from vllm_am.compaction.pages import PagedKV
from vllm_am.config import CompactionConfig
from vllm_am.engine.messages import CompactionStep, QuerySample
from vllm_am.engine.spec import CompactableAttentionSpec
from vllm_am.engine.worker import attention_cuda, live_batch
from vllm_am.engine.worker import state as worker_state
from vllm_am.engine.worker.state import CompactedSequence, WorkerState

BLOCK = 16
KV_HEADS = 2
GROUP = 2
DIM = 32
SCALE = DIM**-0.5
LAYERS = ("layers.0", "layers.1")
NUM_BLOCKS = 96
MAX_ROWS = 8
MAX_TOKENS = 320
WIDTH = 40
POOL = 320


@dataclass
class Request:
    """A sequence of the batch, as vLLM's tables have it."""

    name: str
    length: int
    """Tokens, with those of this step."""
    new: int
    """Tokens of this step."""
    blocks: list[int]
    slot: int
    """Its place in model runner V2's request table."""
    offsets: list[int] = field(default_factory=list)
    """Of the new tokens, those whose queries are kept."""


@dataclass
class World:
    """A worker's state with some requests, and the builder under test."""

    config: Any
    state: WorkerState
    builder: attention_cuda.CompactionMetadataBuilder
    caches: list[torch.Tensor]
    requests: list[Request]
    rng: random.Random
    runner: str

    def common(self, padding: int = 0, **changes: Any) -> CommonAttentionMetadata:
        """What vLLM hands to ``build``: the requests in order, then padding rows and tokens."""
        lengths = [r.length for r in self.requests]
        starts = np.cumsum([0, *(r.new for r in self.requests), *[0] * padding]).astype(np.int32)
        rows = len(lengths) + padding
        # Stale entries behind and within gaps are block ids of other sequences, or worse.
        table = torch.randint(0, NUM_BLOCKS, (rows, WIDTH), dtype=torch.int32)
        for row, request in enumerate(self.requests):
            table[row, : len(request.blocks)] = torch.tensor(request.blocks, dtype=torch.int32)
        values = {
            "query_start_loc": torch.from_numpy(starts.copy()),
            "query_start_loc_cpu": torch.from_numpy(starts),
            "seq_lens": torch.tensor(lengths + [0] * padding, dtype=torch.int32),
            "seq_lens_cpu_upper_bound": torch.tensor([n + 3 for n in lengths] + [0] * padding),
            "num_reqs": rows,
            "num_actual_tokens": int(starts[-1]) + padding,
            "max_query_len": max(r.new for r in self.requests),
            "max_seq_len": max(lengths) + 3,
            "block_table_tensor": table,
            "slot_mapping": torch.full((int(starts[-1]) + padding,), -1),
            # Unpadded, as V2 gives it; V1 gives none.
            "req_idx": np.array([r.slot for r in self.requests]) if self.runner == "v2" else None,
        }
        return CommonAttentionMetadata(**{**values, **changes})

    def build(self, padding: int = 0, **changes: Any) -> attention_cuda.CompactionMetadata:
        return self.builder.build(0, self.common(padding, **changes))

    def compact(self, request: Request, start: int, end: int, pages: list[int]) -> None:
        """Compact blocks [start, end) of the request into as many pages per head as listed."""
        spare = self.rng.sample(range(NUM_BLOCKS * len(LAYERS) * KV_HEADS), sum(pages))
        lists = tuple(torch.tensor(spare).split(pages))
        for ids in lists:
            self.state.kv.bias[ids] = torch.randn(len(ids), BLOCK)
            if len(ids):
                self.state.kv.bias[ids[-1], BLOCK // 2 :] = -torch.inf  # not used
        device = torch.device("cpu")
        self.state.sequences[request.name] = CompactedSequence(
            start * BLOCK, end * BLOCK, lists, device
        )

    def begin_step(self) -> None:
        """The requests are where the runner says; their queries go to the pool."""
        slots = iter(self.rng.sample(range(POOL), sum(len(r.offsets) for r in self.requests)))
        samples = {
            r.name: QuerySample(np.array(r.offsets), np.array([next(slots) for _ in r.offsets]))
            for r in self.requests
            if r.offsets
        }
        self.state.step = CompactionStep(samples=samples)
        if self.runner == "v1":
            names = [r.name for r in self.requests]
            self.state.runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=names))
        else:
            by_slot = {r.slot: r.name for r in self.requests}
            states = SimpleNamespace(index_to_req_id={**by_slot, 99: "not in this batch"})
            self.state.runner = SimpleNamespace(req_states=states)


@pytest.fixture(scope="session")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = make_random_model(tmp_path_factory.mktemp("model"))
    return EngineArgs(
        model=str(model),
        dtype="float32",
        block_size=BLOCK,
        max_model_len=BLOCK * WIDTH,
        max_num_seqs=MAX_ROWS,
        max_num_batched_tokens=BLOCK * WIDTH,
    ).create_engine_config()


@pytest.fixture(params=["v1", "v2"])
def runner(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def world(vllm_config: Any, runner: str, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(vllm_config, runner, monkeypatch)


def make_world(
    vllm_config: Any, runner: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0, graphs: int = 0
) -> World:
    """A world without requests.

    Args:
        graphs: tokens of the largest full CUDA graph; 0 for none.
    """
    torch.manual_seed(seed)
    compilation = vllm_config.compilation_config
    mode = CUDAGraphMode.FULL_AND_PIECEWISE if graphs else CUDAGraphMode.NONE
    monkeypatch.setattr(compilation, "cudagraph_mode", mode)
    monkeypatch.setattr(compilation, "max_cudagraph_capture_size", graphs)
    monkeypatch.setattr(vllm_config.scheduler_config, "max_num_batched_tokens", MAX_TOKENS)
    spec = CompactableAttentionSpec(
        block_size=BLOCK,
        num_kv_heads=KV_HEADS,
        head_size=DIM,
        dtype=torch.float32,
        peak_tokens=BLOCK * WIDTH,
    )
    # vLLM's layout LBHNC: head-major blocks, layer after layer.
    storage = torch.randn(len(LAYERS), NUM_BLOCKS, KV_HEADS, BLOCK, 2 * DIM)
    caches = list(storage)
    state = WorkerState(
        limits=None,  # type: ignore[arg-type]
        layers={
            name: SimpleNamespace(
                layer_name=name, kv_cache=cache, impl=SimpleNamespace(scale=SCALE)
            )
            for name, cache in zip(LAYERS, caches, strict=True)
        },
        kv=PagedKV.from_layers(caches),
        queries={name: torch.zeros(POOL, KV_HEADS * GROUP, DIM) for name in LAYERS},
        fitting=SimpleNamespace(go_on=lambda seconds: ()),  # type: ignore[arg-type]
        runner=None,  # set below
        parts=None,  # type: ignore[arg-type]
    )
    monkeypatch.setitem(worker_state._states, worker_state.engine_key(vllm_config), state)
    with set_current_vllm_config(vllm_config):
        builder = attention_cuda.CompactionMetadataBuilder(
            spec, list(LAYERS), vllm_config, torch.device("cpu"), block_table_width=WIDTH
        )
    builder.num_heads_q = KV_HEADS * GROUP
    builder.live, builder.workspace = attention_cuda.step_buffers(
        spec, KV_HEADS * GROUP, WIDTH, vllm_config, torch.device("cpu")
    )
    return World(vllm_config, state, builder, caches, [], random.Random(seed), runner)


def fill(world: World, compacted: float = 0.5, most_new: int = 7) -> None:
    """Random requests: some compacted, with or without a protected prefix, some sampled."""
    rng = world.rng
    free = rng.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
    slots = rng.sample(range(3 * MAX_ROWS), 3 * MAX_ROWS)
    for index in range(rng.randrange(1, MAX_ROWS)):
        length = rng.randrange(1, 9 * BLOCK)
        new = rng.randrange(1, min(length, most_new) + 1)
        blocks = [free.pop() for _ in range(-(-length // BLOCK))]
        offsets = sorted(rng.sample(range(new), rng.choice([0, 0, 1, new])))
        request = Request(f"request-{index}", length, new, blocks, slots.pop(), offsets)
        world.requests.append(request)
        last = (length - new) // BLOCK  # what is being computed is never compacted
        if last >= 1 and rng.random() < compacted:
            start = rng.randrange(0, last)
            pages = [rng.randrange(0, 4) for _ in range(len(LAYERS) * KV_HEADS)]
            world.compact(request, start, rng.randrange(start + 1, last + 1), pages)
    world.begin_step()


def expected_row(world: World, request: Request) -> tuple[list[int], int]:
    """Blocks of the live part and its length, by the definition."""
    sequence = world.state.sequences.get(request.name)
    if sequence is None:
        return request.blocks, request.length
    gap = slice(sequence.start // BLOCK, sequence.end // BLOCK)
    blocks = [b for i, b in enumerate(request.blocks) if not gap.start <= i < gap.stop]
    return blocks, request.length - (sequence.end - sequence.start)


def check_metadata(world: World, metadata: Any, padding: int = 0) -> None:
    """Compare all that the builder made with the definition, row by row."""
    compacted = metadata.compacted
    longest, tokens = 0, 0
    for row, request in enumerate(world.requests):
        blocks, length = expected_row(world, request)
        assert metadata.seq_lens[row] == length
        assert metadata.block_table[row, : len(blocks)].tolist() == blocks
        sequence = world.state.sequences.get(request.name)
        if compacted is not None:
            table = 0 if sequence is None else sequence.table.data_ptr()
            assert compacted.rows.page_tables[row] == table
            sample = world.state.step.samples.get(request.name) if world.state.step else None
            slots = torch.full((request.new,), -1)
            if sample is not None:
                slots[sample.offsets] = torch.from_numpy(sample.slots)
            assert torch.equal(compacted.capture_slots[tokens : tokens + request.new], slots)
        else:
            assert sequence is None and not request.offsets
        longest, tokens = max(longest, length), tokens + request.new
    assert longest <= metadata.max_seq_len
    rows = slice(len(world.requests), len(world.requests) + padding)
    assert (metadata.seq_lens[rows] == 0).all()
    if compacted is not None:
        assert (compacted.rows.page_tables[rows] == 0).all()
        assert (compacted.capture_slots[tokens:] == -1).all()


@pytest.mark.parametrize("graphs", [0, MAX_TOKENS], ids=["eager", "graphs"])
@pytest.mark.parametrize("seed", range(12))
def test_live_tables_equal_the_definition(vllm_config, runner, monkeypatch, seed, graphs):
    world = make_world(vllm_config, runner, monkeypatch, seed, graphs)
    fill(world)
    padding = world.rng.randrange(MAX_ROWS - len(world.requests) + 1)
    check_metadata(world, world.build(padding), padding)


def test_the_length_bound_is_that_of_the_live_part(world):
    world.requests = [
        Request("long", 8 * BLOCK, 1, list(range(1, 9)), 3),
        Request("short", 2 * BLOCK, 1, list(range(9, 11)), 0),
    ]
    world.compact(world.requests[0], 1, 7, [1] * 4)
    world.begin_step()
    assert world.build().max_seq_len == 2 * BLOCK + 3  # the upper bound is 3 too much


def test_the_schedule_of_flash_attention_3_is_that_of_the_live_part(world, monkeypatch):
    seen = {}

    def get_scheduler_metadata(**arguments: Any) -> torch.Tensor:
        seen.update(arguments)
        return torch.zeros(5, dtype=torch.int32)

    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", get_scheduler_metadata, raising=False)
    fill(world, compacted=1.0)
    world.builder.aot_schedule = True
    metadata = world.build()
    assert metadata.scheduler_metadata is not None
    assert seen["cache_seqlens"] is metadata.seq_lens
    assert seen["max_seqlen_k"] == metadata.max_seq_len
    check_metadata(world, metadata)


def test_dummy_rows_alias_live_slots(world):
    fill(world, compacted=1.0)
    assert world.state.sequences
    world.state.step = None  # a dummy batch: rows 0, 1, 2, ... of any request table, tiny
    rows = 3
    metadata = world.builder.build_for_cudagraph_capture(
        world.common(
            num_reqs=rows,
            num_actual_tokens=rows,
            query_start_loc=torch.arange(rows + 1, dtype=torch.int32),
            query_start_loc_cpu=torch.arange(rows + 1, dtype=torch.int32),
            seq_lens=torch.ones(rows, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.ones(rows, dtype=torch.int32),
            block_table_tensor=torch.zeros(rows, WIDTH, dtype=torch.int32),
            max_seq_len=BLOCK * WIDTH,
            req_idx=np.arange(rows) if world.runner == "v2" else None,
        )
    )
    assert metadata.seq_lens.tolist() == [1] * rows
    assert metadata.max_seq_len == BLOCK * WIDTH
    assert metadata.compacted is None or not metadata.compacted.rows.page_tables.any()


def test_preempted_and_resumed(world):
    fill(world, compacted=1.0)
    name = next(iter(world.state.sequences))
    world.state.begin_step(None, gone={name})
    metadata = world.build()
    check_metadata(world, metadata)
    row = next(i for i, r in enumerate(world.requests) if r.name == name)
    assert metadata.seq_lens[row] == world.requests[row].length


def test_several_segments(world):
    request = Request("one", 8 * BLOCK, 2, list(range(1, 9)), 5)
    world.requests = [request]
    world.compact(request, 1, 3, [2, 1, 0, 3])
    world.begin_step()
    check_metadata(world, world.build())
    first = world.state.sequences["one"]
    more = tuple(torch.tensor([300 + i]) for i in range(4))
    world.state.sequences["one"] = first.extended(6 * BLOCK, more)
    metadata = world.build()
    check_metadata(world, metadata)
    assert metadata.block_table[0, :3].tolist() == [1, 7, 8]


def test_nothing_compacted_is_flash_attention_alone(world):
    fill(world, compacted=0.0)
    for request in world.requests:
        request.offsets.clear()
    world.begin_step()
    common = world.common()
    metadata = world.builder.build(0, common)
    assert metadata.compacted is None
    assert metadata.block_table is common.block_table_tensor
    assert metadata.seq_lens is common.seq_lens
    assert metadata.max_seq_len == common.max_seq_len


def test_queries_are_kept_before_anything_is_compacted(world):
    fill(world, compacted=0.0)
    world.requests[0].offsets = [0]
    world.begin_step()
    common = world.common()
    metadata = world.builder.build(0, common)
    assert metadata.block_table is common.block_table_tensor
    check_metadata(world, metadata)


def test_graphs_read_the_same_buffers_every_step(vllm_config, runner, monkeypatch):
    world = make_world(vllm_config, runner, monkeypatch, graphs=16)
    addresses = set()
    for seed in range(4):
        world.rng.seed(seed)
        world.requests.clear()
        world.state.sequences.clear()
        fill(world, compacted=float(seed % 2), most_new=1)
        metadata = world.build(padding=MAX_ROWS - len(world.requests))
        check_metadata(world, metadata, padding=MAX_ROWS - len(world.requests))
        buffers = [metadata.seq_lens, metadata.block_table, metadata.compacted.capture_slots]
        addresses.add(tuple(t.data_ptr() for t in [*buffers, metadata.compacted.rows.page_tables]))
    assert len(addresses) == 1
    # Larger than the largest graph, and nothing to do: stock.
    world.requests = [Request("prefill", 20, 20, [1, 2], 0)]
    world.state.sequences.clear()
    world.begin_step()
    assert world.build().compacted is None


def test_a_batch_larger_than_the_buffers_is_an_error(world):
    fill(world, compacted=1.0)
    with pytest.raises(ValueError, match=f"buffers for {MAX_ROWS} rows"):
        world.build(padding=MAX_ROWS)


# -- the forward pass -----------------------------------------------------------------------------


def make_impl(
    config: Any, sinks: torch.Tensor | None = None
) -> attention_cuda.CompactionAttentionImpl:
    with set_current_vllm_config(config):
        return attention_cuda.CompactionAttentionImpl(
            KV_HEADS * GROUP, DIM, SCALE, KV_HEADS, None, None, "auto", sinks=sinks
        )


def reference(
    world: World, layer: int, query: torch.Tensor, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """The CPU backend's attention on the same state."""
    out, rows, first = torch.zeros_like(query), [], 0
    for request in world.requests:
        last = first + request.new
        blocks, length = expected_row(world, request)
        sequence = world.state.sequences.get(request.name)
        pages = None if sequence is None else sequence.padded
        rows.append(PagedRow(first, last, torch.tensor(blocks), length, pages))
        first = last
    for group in group_rows(rows, world.state.kv):
        out[group.queries] = attend_pages(
            query[group.queries], world.state.kv, group, layer, scale=SCALE, sinks=sinks
        )
    return out


@pytest.mark.parametrize("graphs", [0, MAX_TOKENS], ids=["eager", "graphs"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_attention_equals_the_cpu_backends(
    vllm_config, runner, monkeypatch, seed, graphs, with_sinks
):
    sinks = torch.linspace(-10, 10, KV_HEADS * GROUP) if with_sinks else None
    world = make_world(vllm_config, runner, monkeypatch, 100 + seed, graphs)
    fill(world, most_new=[1, 3, 40][seed % 3])
    padding = world.rng.randrange(MAX_ROWS - len(world.requests) + 1)
    metadata = world.build(padding)
    impl = make_impl(vllm_config, sinks)
    tokens = sum(r.new for r in world.requests)
    for index, name in enumerate(LAYERS):
        query = torch.randn(tokens + padding, KV_HEADS * GROUP, DIM)
        output = torch.full_like(query, 7.0)
        layer = world.state.layers[name]
        for scale in ("_q_scale", "_k_scale", "_v_scale"):
            setattr(layer, scale, torch.ones(()))
        impl.forward(layer, query, query, query, world.caches[index], metadata, output)
        torch.testing.assert_close(
            output[:tokens], reference(world, index, query[:tokens], sinks), rtol=1e-5, atol=1e-5
        )
        assert (output[tokens:] == 7).all(), "padding was written"
        kept, first = torch.zeros(POOL, KV_HEADS * GROUP, DIM), 0
        for request in world.requests:
            if (sample := world.state.step.samples.get(request.name)) is not None:
                kept[sample.slots] = query[first + sample.offsets]
            first += request.new
        assert torch.equal(world.state.queries[name], kept)


def test_profiling_runs_without_metadata(vllm_config):
    output = torch.full((3, KV_HEADS * GROUP, DIM), 7.0)
    impl = make_impl(vllm_config)
    empty = torch.empty(0)
    impl.forward(SimpleNamespace(), output, empty, empty, empty, None, output)
    assert (output == 0).all()


def test_warm_up_changes_nothing(world):
    pages, bias = world.state.kv.pages.clone(), world.state.kv.bias.clone()
    world.builder.warm_up(world.state)
    assert torch.equal(world.state.kv.pages, pages) and torch.equal(world.state.kv.bias, bias)
    assert not any(pool.any() for pool in world.state.queries.values())
    assert not world.builder.workspace.arrivals.any()


# -- the worker -----------------------------------------------------------------------------------


@pytest.fixture
def worker(vllm_config: Any) -> Any:
    """Our GPU worker without a GPU: only what its own methods look at."""
    from vllm_am.engine.worker.worker_cuda import CompactionCUDAWorker

    worker = object.__new__(CompactionCUDAWorker)
    worker.vllm_config = vllm_config
    worker.device = torch.device("cpu")
    return worker


def test_the_worker_reserves_what_the_builder_allocates(world, worker):
    spec, device = world.builder.kv_cache_spec, torch.device("cpu")
    with set_current_vllm_config(world.config):
        builder = attention_cuda.CompactionMetadataBuilder(
            spec, list(LAYERS), world.config, device, block_table_width=WIDTH
        )
    allocated = builder.live.nbytes + builder.workspace.nbytes
    assert allocated >= 4 * MAX_ROWS * WIDTH  # the block table alone
    assert worker.step_buffer_bytes(spec) == allocated


def test_the_worker_compiles_before_graphs_are_captured(world, worker, monkeypatch):
    from vllm.v1.worker.gpu_worker import Worker

    order = []
    group = SimpleNamespace(get_metadata_builder=lambda: world.builder)
    worker.model_runner = SimpleNamespace(attn_groups=[[group]])
    worker._compaction = world.state
    world.state.fitting.config = CompactionConfig()
    monkeypatch.setattr(type(worker), "_find_head_weights", lambda self, s: order.append("heads"))
    monkeypatch.setattr(type(world.state), "warm_up", lambda self: order.append("fits"))
    monkeypatch.setattr(world.builder, "warm_up", lambda state: order.append(state))
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: order.append("vLLM"))
    worker.compile_or_warm_up_model()
    assert order == ["fits", world.state, "vLLM", "heads"]


# -- no waiting for the device --------------------------------------------------------------------


class OnlyAsynchronousCopies(TorchDispatchMode):
    """Fails on a copy from the host that waits. The device is ``meta``: reading it fails anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, source, *non_blocking = args
            if target.is_meta and not source.is_meta:
                self.copies += 1
                assert non_blocking == [True] or (kwargs or {}).get("non_blocking"), "it waits"
        elif func is torch.ops.aten._to_copy.default and not args[0].is_meta:
            tensors = [t for t in tree_leaves(kwargs) if isinstance(t, torch.device)]
            assert all(device.type != "meta" for device in tensors), "a copy that allocates"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("graphs", [0, MAX_TOKENS], ids=["eager", "graphs"])
def test_no_host_sync_in_a_step(vllm_config, runner, monkeypatch, graphs):
    world = make_world(vllm_config, runner, monkeypatch, 3, graphs)
    fill(world, compacted=1.0)
    assert world.state.sequences and world.state.step.samples
    tables = {name: s.table for name, s in world.state.sequences.items()}
    device = torch.device("meta")
    spec = world.builder.kv_cache_spec
    builder = world.builder
    builder.device = device
    builder.live, builder.workspace = attention_cuda.step_buffers(
        spec, KV_HEADS * GROUP, WIDTH, vllm_config, device
    )
    launched = []
    monkeypatch.setattr(live_batch, "live_tables", lambda *a, **k: launched.append("tables"))
    monkeypatch.setattr(
        attention_cuda, "attend_compacted", lambda *a, **k: launched.append("compacted")
    )
    monkeypatch.setattr(
        flash_attn,
        "flash_attn_varlen_func",
        lambda out, **k: (out, torch.empty(out.shape[1], out.shape[0], device=device)),
    )
    common = world.common()
    on_device = {
        name: getattr(common, name).to(device)
        for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    }
    impl = make_impl(vllm_config)
    layer = world.state.layers[LAYERS[0]]
    query = torch.empty(common.num_actual_tokens, KV_HEADS * GROUP, DIM, device=device)
    cache = torch.empty(NUM_BLOCKS, KV_HEADS, BLOCK, 2 * DIM, device=device)
    with OnlyAsynchronousCopies() as watched:
        metadata = builder.build(0, common.replace(**on_device))
        impl.forward(layer, query, query, query, cache, metadata, torch.empty_like(query))
    assert launched == ["tables", "compacted"]
    assert watched.copies == 1
    assert all(world.state.sequences[name].table is table for name, table in tables.items())
