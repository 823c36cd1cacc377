"""Attention over compacted slots, merged with the live part: the kernel against fp64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.device import DTYPES, ON_GPU
from vllm_am.compaction.pages import PagedKV, page_table
from vllm_am.kernels.attention import (
    CompactedAttentionWorkspace,
    QueryCapture,
    RowTables,
    attend_compacted,
    attend_compacted_reference,
)

LAYERS = 2
SCALE = 0.125


@dataclass
class Batch:
    """Arguments of the kernel, and the tables that its addresses point to."""

    kv: PagedKV
    query: Tensor
    output: Tensor
    live_lse: Tensor
    query_lens: list[int]
    tables: list[Tensor | None]
    rows: RowTables

    @property
    def starts(self) -> list[int]:
        return self.rows.query_start_loc.tolist()

    def workspace(self, **options) -> CompactedAttentionWorkspace:
        heads = self.kv.num_kv_heads
        group = self.query.shape[1] // heads
        options = {"max_query_len": 4, "programs": 4 * len(self.tables) * heads} | options
        return CompactedAttentionWorkspace(
            len(self.tables), heads, group, self.query.shape[2], self.query.device, **options
        )

    def attend(
        self,
        layer: int = 0,
        workspace: CompactedAttentionWorkspace | None = None,
        capture: QueryCapture | None = None,
        max_query_len: int | None = None,
    ) -> Tensor:
        """A new output tensor; nothing else changes."""
        output = self.output.clone()
        attend_compacted(
            self.query,
            output,
            self.live_lse,
            self.kv,
            layer,
            self.rows,
            self.workspace() if workspace is None else workspace,
            scale=SCALE,
            max_query_len=max_query_len or max(self.query_lens),
            capture=capture,
        )
        return output

    def reference(self, layer: int = 0) -> Tensor:
        return attend_compacted_reference(
            self.query,
            self.output,
            self.live_lse,
            self.kv,
            layer,
            self.starts,
            self.tables,
            scale=SCALE,
        )

    def compacted_rows(self) -> list[tuple[range, Tensor]]:
        """Tokens and page table of each row that has something compacted."""
        return [
            (range(start, end), table)
            for start, end, table in zip(
                self.starts[:-1], self.starts[1:], self.tables, strict=True
            )
            if table is not None
        ]

    def compacted_tokens(self) -> list[int]:
        return [token for tokens, _ in self.compacted_rows() for token in tokens]

    def page_ids(self, table: Tensor, layer: int, head: int) -> Tensor:
        begin, end = table[layer * self.kv.num_kv_heads + head :][:2].tolist()
        return table[begin:end].long()


def make_batch(
    device: torch.device,
    query_lens: Sequence[int],
    lengths: Sequence[Sequence[int] | None],
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    padding: int = 3,
) -> Batch:
    """Random queries, keys, values and biases.

    Args:
        lengths: slots of each row's heads, repeated over its (layer, head) pairs and shifted by
            the row; None where nothing is compacted.
        padding: tokens after those of the last row.

    Pages are dealt at random over all layers' storage; what no head owns is NaN.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = LAYERS * heads
    slots = [
        None if row is None else [row[(h + i) % len(row)] for h in range(pairs)]
        for i, row in enumerate(lengths)
    ]
    needed = sum(-(-length // block_size) for row in slots if row is not None for length in row)
    blocks = needed // pairs + 2
    storage = torch.full((LAYERS, blocks, heads, block_size, 2 * head_dim), torch.nan, dtype=dtype)
    kv = PagedKV.from_layers(list(storage.to(device)))
    kv.bias.fill_(torch.nan)
    free = torch.randperm(len(kv.pages), generator=generator)

    tables: list[Tensor | None] = []
    for row in slots:
        if row is None:
            tables.append(None)
            continue
        lists = []
        for length in row:
            count = -(-length // block_size)
            ids, free = free[:count], free[count:]
            lists.append(ids)
            shape = (count, block_size, 2 * head_dim)
            kv.pages[ids.to(device)] = torch.randn(shape, generator=generator).to(device, dtype)
            bias = torch.randn(count * block_size, generator=generator) * 2
            bias[length:] = -torch.inf
            kv.bias[ids.to(device)] = bias.view(count, block_size).to(device)
        tables.append(page_table(lists).to(device))

    starts = torch.tensor([0, *query_lens]).cumsum(0).to(device, torch.int32)
    tokens = sum(query_lens) + padding
    # As in vLLM, the queries are a slice of the projection's output.
    width = (group + 2) * heads
    projection = torch.randn(tokens, width, head_dim, generator=generator).to(device, dtype)
    query = projection[:, : group * heads]
    output = torch.randn(query.shape, generator=generator).to(device, dtype)
    live_lse = (torch.randn(query.shape[1::-1], generator=generator) + 3).to(device)
    addresses = [0 if table is None else table.data_ptr() for table in tables]
    rows = RowTables(starts, torch.tensor(addresses, dtype=torch.int64, device=device))
    return Batch(kv, query, output, live_lse, list(query_lens), tables, rows)


def assert_close_to_reference(actual: Tensor, batch: Batch, layer: int = 0) -> None:
    """Within rounding of the softmax weights and of the result to the dtype.

    A weight and the result have relative errors of at most u = eps / 2 each, so the error is
    below 2 u max |v|, the maximum taken over all values and live outputs. fp32 scores have
    errors of their own, a few ulp of their size.
    """
    expected = batch.reference(layer)
    largest = max(float(batch.kv.pages.float().nan_to_num().abs().max()), 4.0)
    bound = (torch.finfo(batch.query.dtype).eps + 4e-6) * largest
    assert bool(actual.isfinite().all())
    assert float((actual.double() - expected).abs().max()) <= bound
    moved = (expected - batch.output.double()).abs().amax((1, 2))[batch.compacted_tokens()]
    assert float(moved.median()) > 20 * bound, "the compacted part makes no difference"


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# Slots of a head: none, one, less than a page, an odd number of pages, and enough for several
# splits. Rows: compacted and not, mixed; without tokens; padded.
LENGTHS = [[0, 5, 700, 1], None, [161, 2000, 17, 300], [33, 16, 1, 48], None, None]
DECODE = [1, 1, 1, 0, 1, 0]
VERIFY = [3, 1, 4, 2, 4, 0]
CHUNKS = [17, 3, 70, 1, 40, 0]

SHAPES = [
    pytest.param(
        group,
        head_dim,
        block_size,
        id=f"group{group}-d{head_dim}-page{block_size}",
        marks=[pytest.mark.slow] if head_dim > 128 else [],
    )
    for group, head_dim, block_size in [
        (1, 64, 16),
        (4, 128, 16),
        (8, 64, 32),
        (3, 80, 64),
        (2, 96, 128),
        (5, 112, 16),
        (2, 192, 32),
        (1, 256, 16),
    ]
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("query_lens", [DECODE, VERIFY, CHUNKS], ids=["decode", "verify", "chunks"])
def test_matches_fp64(device, dtype, group, head_dim, block_size, query_lens):
    batch = make_batch(
        device,
        query_lens,
        LENGTHS,
        dtype=dtype,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
    )
    for layer in range(LAYERS):
        assert_close_to_reference(batch.attend(layer), batch, layer)


@pytest.mark.parametrize("programs", [1, 30, 48, 250])
def test_any_number_of_splits(device, programs):
    batch = make_batch(device, VERIFY, LENGTHS)
    workspace = batch.workspace(programs=programs)
    assert_close_to_reference(batch.attend(0, workspace), batch)
    assert not workspace.arrivals.any(), "the next launch would miscount"


def test_regimes_agree(device):
    """The same rows split, and as chunks."""
    batch = make_batch(device, VERIFY, LENGTHS)
    chunks = batch.attend(workspace=batch.workspace(max_query_len=0))
    torch.testing.assert_close(batch.attend(), chunks, rtol=1e-5, atol=1e-5)
    assert not same_bytes(batch.attend(), chunks)


@pytest.mark.parametrize("query_lens", [CHUNKS, [40, 1, 1, 4, 5, 0]], ids=["chunks", "mixed"])
def test_rows_of_few_tokens_are_split_beside_chunks(device, query_lens):
    """To the bit as in a step of their own: a prefill chunk in the batch does not slow them."""
    batch = make_batch(device, query_lens, LENGTHS)
    workspace = batch.workspace()
    whole = batch.attend(workspace=workspace)
    assert_close_to_reference(whole, batch)
    few = [length if length <= 4 else 0 for length in query_lens]
    # The same tokens, but the long rows have no share in the step.
    alone = whole.clone()
    for row, (length, kept) in enumerate(zip(query_lens, few, strict=True)):
        if kept == 0 or batch.tables[row] is None:
            continue
        tokens = slice(batch.starts[row], batch.starts[row] + length)
        starts = torch.full_like(batch.rows.query_start_loc, batch.starts[row])
        starts[row + 1 :] += length
        one = replace(batch, rows=replace(batch.rows, query_start_loc=starts))
        alone[tokens] = one.attend(workspace=workspace, max_query_len=4)[tokens]
        assert not same_bytes(whole[tokens], batch.output[tokens])
    assert same_bytes(alone, whole)


@pytest.mark.parametrize("query_lens", [DECODE, CHUNKS], ids=["decode", "chunks"])
def test_an_inactive_batch_is_left_alone(device, query_lens):
    """Whatever the tables say; and an active one is served."""
    batch = make_batch(device, query_lens, LENGTHS, dtype=torch.float16)
    active = torch.zeros(1, dtype=torch.int32, device=device)
    flagged = replace(batch, rows=replace(batch.rows, active=active))
    pool = torch.full((200, *batch.query.shape[1:]), 7.0, dtype=torch.float16, device=device)
    capture = QueryCapture(torch.arange(len(batch.query), device=device), pool)
    assert same_bytes(flagged.attend(capture=capture), batch.output)
    assert bool((pool == 7).all())
    active.fill_(1)
    assert same_bytes(flagged.attend(capture=capture), batch.attend())
    assert not bool((pool == 7).all())


@pytest.mark.parametrize("query_lens", [DECODE, CHUNKS], ids=["decode", "chunks"])
def test_runs_are_bitwise_equal(device, query_lens):
    batch = make_batch(device, query_lens, LENGTHS)
    workspace = batch.workspace()
    first = batch.attend(1, workspace)
    for _ in range(20 if ON_GPU else 1):  # programs arrive in another order each time
        assert same_bytes(first, batch.attend(1, workspace))


@pytest.mark.parametrize("query_lens", [VERIFY, CHUNKS], ids=["verify", "chunks"])
def test_every_slot_is_read_from_its_address(device, query_lens):
    """Each query selects one slot, whose value is its own address: no tolerance.

    Keys are random signs; the queries are the keys of their targets times 64, so that any other
    slot has a weight that underflows to 0.
    """
    lengths = [[0, 5, 600, 1], None, [161, 700, 17, 48], [33, 16, 1, 48], None, None]
    batch = make_batch(device, query_lens, lengths, dtype=torch.float16)
    pages, size, width = batch.kv.pages.shape
    head_dim = width // 2
    assert max(pages, size, head_dim) <= 2048  # integers of fp16
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (pages, size, head_dim), generator=generator) * 2 - 1
    addresses = torch.arange(head_dim).repeat(pages, size, 1)
    addresses[..., 0] = torch.arange(pages)[:, None]
    addresses[..., 1] = torch.arange(size)
    batch.kv.pages.copy_(torch.cat([signs, addresses], -1))
    batch.kv.bias.masked_fill_(batch.kv.bias > -torch.inf, 0)
    batch.live_lse.fill_(-torch.inf)
    batch.output.fill_(torch.nan)
    heads, group = batch.kv.num_kv_heads, 2

    for layer in range(LAYERS):
        expected = batch.output.clone()
        turn = 0
        for tokens, table in batch.compacted_rows():
            for head in range(heads):
                ids = batch.page_ids(table, layer, head)
                used = (batch.kv.bias[ids] == 0).nonzero()
                if len(used) == 0:
                    continue
                for token in tokens:
                    for q in range(head * group, (head + 1) * group):
                        # Steps of a prime number of slots reach all parts of long heads.
                        page, slot = used[turn * 37 % len(used)]
                        turn += 1
                        batch.query[token, q] = batch.kv.pages[ids[page], slot, :head_dim] * 64
                        expected[token, q] = batch.kv.pages[ids[page], slot, head_dim:]
        assert turn > 20
        assert same_bytes(batch.attend(layer), expected)


@pytest.mark.parametrize("query_lens", [VERIFY, CHUNKS], ids=["verify", "chunks"])
def test_what_must_not_change(device, query_lens):
    batch = make_batch(device, query_lens, LENGTHS, dtype=torch.float16)
    # A head of the first row has no slot, one of the third has slots that are all hidden.
    (first, _), (third, table), _ = batch.compacted_rows()
    batch.kv.bias[batch.page_ids(table, 0, 1)] = -torch.inf
    batch.output[0, :, 5] = torch.nan
    inputs = [
        batch.kv.pages,
        batch.kv.bias,
        batch.query,
        batch.live_lse,
        batch.rows.query_start_loc,
        batch.rows.page_tables,
        *(table for table in batch.tables if table is not None),
    ]
    before = [tensor.clone() for tensor in inputs]
    after = batch.attend()

    for tensor, copy in zip(inputs, before, strict=True):
        assert same_bytes(tensor, copy)
    untouched = torch.ones(len(after), dtype=torch.bool)
    untouched[batch.compacted_tokens()] = False
    assert same_bytes(after[untouched.to(device)], batch.output[untouched.to(device)])
    assert same_bytes(after[list(first), :2], batch.output[list(first), :2])  # KV head 0
    assert same_bytes(after[list(third), 2:], batch.output[list(third), 2:])  # KV head 1
    assert not (after[list(third), :2] == batch.output[list(third), :2]).all()


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
@pytest.mark.parametrize("query_lens", [DECODE, CHUNKS], ids=["decode", "chunks"])
def test_without_live_tokens_the_compacted_part_is_all(device, query_lens, empty):
    batch = make_batch(device, query_lens, LENGTHS)
    alone = replace(batch, live_lse=torch.full_like(batch.live_lse, -torch.inf))
    expected = alone.reference()
    actual = replace(
        batch,
        live_lse=torch.full_like(batch.live_lse, empty),
        output=torch.full_like(batch.output, torch.nan),
    ).attend()
    seen = actual.isfinite()
    assert seen.any()
    torch.testing.assert_close(actual[seen], expected[seen].float(), rtol=1e-5, atol=1e-5)
    # What is NaN is what sees nothing at all.
    heads = replace(alone, output=torch.zeros_like(batch.output)).reference()
    assert torch.equal(seen, heads != 0)


@pytest.mark.parametrize("query_lens", [DECODE, CHUNKS], ids=["decode", "chunks"])
def test_hidden_slots_before_visible_ones(device, query_lens):
    """Whole steps, and whole splits, that see nothing."""
    batch = make_batch(device, query_lens, LENGTHS)
    (_, first), (_, third), _ = batch.compacted_rows()
    for table, head, hidden in [(first, 0, 16), (third, 0, 4), (third, 1, 124)]:
        batch.kv.bias[batch.page_ids(table, 1, head)[:hidden]] = -torch.inf
    assert_close_to_reference(batch.attend(1), batch, 1)


@pytest.mark.parametrize("query_lens", [DECODE, CHUNKS], ids=["decode", "chunks"])
def test_huge_biases_and_scores(device, query_lens):
    """A slot of every head takes all the weight, or the live part does."""
    batch = make_batch(device, query_lens, [[1200, 40], None, [300, 7], [64], None, None])
    batch.kv.pages[..., :64] *= 1000.0
    batch.kv.bias.clamp_(min=-3e4)  # unused slots too: they now count, with no weight
    expected = batch.output.clone()
    for tokens, table in batch.compacted_rows():
        for head in range(2):
            ids = batch.page_ids(table, 0, head)
            batch.kv.bias[ids[-1], 3] = 1e6
            expected[list(tokens), 2 * head : 2 * head + 2] = batch.kv.pages[ids[-1], 3, 64:]
    scores = batch.query[: batch.starts[-1]].abs().max() * 1000 * SCALE
    assert scores > 300  # exp overflows without the shift
    assert same_bytes(batch.attend(), expected)

    live = replace(batch, live_lse=torch.full_like(batch.live_lse, 3e6))
    assert torch.equal(live.attend(), batch.output)


@pytest.mark.parametrize("query_lens", [DECODE, VERIFY, CHUNKS], ids=["one", "few", "chunks"])
def test_queries_are_captured(device, query_lens):
    """Of all rows, also those with nothing compacted; and only the chosen tokens."""
    batch = make_batch(device, query_lens, LENGTHS, dtype=torch.float16, group=3, head_dim=80)
    tokens, heads, head_dim = batch.query.shape
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(2 * tokens, generator=generator)[:tokens]
    slots[torch.rand(tokens, generator=generator) < 0.4] = -1
    slots[batch.starts[1]] = 2 * tokens  # a token of a row with nothing compacted
    pool = torch.full((2 * tokens + 1, 2, heads, head_dim), torch.nan, dtype=torch.float16)
    pool = pool.to(device)[:, 1]  # a layer's part of a larger pool
    expected = pool.clone()
    real = torch.arange(tokens) < batch.starts[-1]
    kept = real & (slots >= 0)
    assert 1 < kept.sum() < real.sum()
    expected[slots[kept].to(device)] = batch.query[kept.to(device)]

    actual = batch.attend(capture=QueryCapture(slots.to(device), pool))
    assert same_bytes(pool, expected)
    assert same_bytes(actual, batch.attend())


def test_nothing_compacted(device):
    batch = make_batch(device, [1, 40], [None, None])
    assert same_bytes(batch.attend(), batch.output)


def test_empty_batch(device):
    batch = make_batch(device, [1], [None])
    rows = RowTables(batch.rows.query_start_loc[:1], batch.rows.page_tables[:0])
    empty = replace(batch, rows=rows)
    assert same_bytes(empty.attend(), batch.output)


def test_splits_fit_the_workspace(device):
    workspace = CompactedAttentionWorkspace(1024, 8, 4, 128, device, programs=2112)
    for rows in (1, 3, 64, 100, 132, 1024):
        splits = workspace.splits(rows)
        assert splits >= 1
        assert splits == 1 or rows * 8 * splits <= 2112
    assert workspace.splits(64) == 4
    assert workspace.nbytes == 2112 * 4 * (128 + 2) * 4 + 1024 * 8 * 4


def test_what_does_not_fit_is_refused(device):
    batch = make_batch(device, [1, 1], [[5], None])
    other = CompactedAttentionWorkspace(2, 2, 2, 128, device)
    with pytest.raises(ValueError, match="workspace for 2 x 2 of size 128"):
        batch.attend(workspace=other)
    small = CompactedAttentionWorkspace(1, 2, 2, 64, device)
    with pytest.raises(ValueError, match="2 rows, workspace for 1"):
        batch.attend(workspace=small)
    rows = RowTables(batch.rows.query_start_loc[:2], batch.rows.page_tables)
    with pytest.raises(ValueError, match="one element more"):
        replace(batch, rows=rows).attend(workspace=batch.workspace())
    with pytest.raises(ValueError, match="contiguous"):
        replace(batch, query=batch.query.mT.contiguous().mT).attend()


@pytest.mark.slow
def test_partial_sums_are_published_before_their_program_is_counted(tmp_path):
    """The order of global memory accesses that the split regime relies on, in compiled code.

    ``tl.debug_barrier`` and the barrier after a scalar atomic are Triton's habit rather than its
    promise. Without the first, threads other than the counting one may store too late; without the
    second, they may load too early.
    """
    program = (
        "from tests.kernels.compile_cases_attention import CASES\n"
        "from tests.kernels.compile_only import compile_cases\n"
        "compile_cases(90, CASES[:1])"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env=environment)
    (file,) = tmp_path.glob("**/attend_compacted_kernel.ptx")
    pattern = r"\b(st\.global|ld\.global|bar\.sync|atom\.global\S*)"
    accesses = re.findall(pattern, file.read_text())
    (count,) = (i for i, access in enumerate(accesses) if access.startswith("atom"))
    assert accesses[count] == "atom.global.gpu.acq_rel.add.u32"
    assert accesses[count - 2 : count] == ["st.global", "bar.sync"]
    assert accesses[count + 1] == "bar.sync"
    assert "ld.global" in accesses[count + 2 :]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_graph_replay_follows_the_tables(device):
    """A captured launch serves batches that it has not seen, from the same buffers."""
    batch = make_batch(device, [1] * 6, LENGTHS, dtype=torch.bfloat16)
    workspace = batch.workspace()
    tables = batch.rows.page_tables
    captured = RowTables(batch.rows.query_start_loc, torch.zeros_like(tables))
    buffers = replace(batch, rows=captured, output=batch.output.clone())

    def launch() -> None:
        attend_compacted(
            buffers.query,
            buffers.output,
            buffers.live_lse,
            buffers.kv,
            0,
            captured,
            workspace,
            scale=SCALE,
            max_query_len=1,
        )

    launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for addresses in (tables, torch.zeros_like(tables), tables):
        captured.page_tables.copy_(addresses)
        buffers.output.copy_(batch.output)
        graph.replay()
        expected = replace(batch, rows=replace(batch.rows, page_tables=addresses)).attend()
        assert same_bytes(buffers.output, expected)
