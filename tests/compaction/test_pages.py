"""Museum row 7: pages of several layers in one allocation; what is not written stays."""

from __future__ import annotations

import pytest
import torch

from vllm_am.compaction import CompactedKV
from vllm_am.compaction.pages import (
    PagedKV,
    page_slots,
    page_table,
    read_pages,
    read_segments,
    write_pages,
)

BLOCKS, HEADS, LAYERS = 7, 3, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

layouts = pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def make_layers(layout: str, block_size: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """[BLOCKS, H, block_size, 2D] by layer; the bits of every number are its own address."""
    sizes = {"L": LAYERS, "B": BLOCKS, "H": HEADS, "N": block_size, "C": 2 * dim}
    shape = [sizes[axis] for axis in layout]
    count = torch.Size(shape).numel()
    assert count < 31744  # above, the bits of float16 would be NaNs
    storage = torch.arange(count, dtype=BITS[dtype]).view(dtype).view(shape)
    return list(storage.unbind(layout.index("L")))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype])


def compacted_kv(lengths: list[int], dim: int, dtype: torch.dtype) -> CompactedKV:
    """Random slots; head h has ``lengths[h]`` of them, the rest is padding."""
    generator = torch.Generator().manual_seed(3)
    heads, width = len(lengths), max(lengths)
    padding = torch.arange(width) >= torch.tensor(lengths)[:, None]
    nothing = torch.zeros(heads)
    return CompactedKV(
        keys=torch.randn(heads, width, dim, generator=generator).to(dtype),
        bias=torch.randn(heads, width, generator=generator).masked_fill(padding, -torch.inf),
        values=torch.randn(heads, width, dim, generator=generator).to(dtype),
        lengths=torch.tensor(lengths),
        indices=torch.arange(width).expand(heads, -1),
        output_error=nothing,
        mass_error=nothing,
        kkt_residual=nothing,
        ok=torch.ones(heads, dtype=torch.bool),
    )


@layouts
@dtypes
@pytest.mark.parametrize(
    ("block_size", "page_size", "dim"),
    [(1, None, 8), (8, None, 5), (16, 16, 8), (16, 4, 8), (12, 6, 5)],
)
def test_pages_of_blocks_are_the_blocks(layout, dtype, block_size, page_size, dim):
    layers = make_layers(layout, block_size, dim, dtype)
    kv = PagedKV.from_layers(layers, page_size)
    assert kv.num_heads == LAYERS * HEADS and kv.block_size == block_size
    assert kv.page_size == (page_size or block_size)
    blocks = [5, 2, 0, 6]
    pages = kv.block_pages(blocks)
    assert pages.shape == (kv.num_heads, len(blocks) * block_size // kv.page_size)
    keys, values = read_pages(kv, pages)
    assert keys.shape == values.shape == (kv.num_heads, len(blocks) * block_size, dim)
    for layer, cache in enumerate(layers):
        for token in range(len(blocks) * block_size):
            block, offset = blocks[token // block_size], token % block_size
            rows = slice(layer * HEADS, (layer + 1) * HEADS)
            assert torch.equal(bits(keys[rows, token]), bits(cache[block, :, offset, :dim]))
            assert torch.equal(bits(values[rows, token]), bits(cache[block, :, offset, dim:]))
    keys_before = bits(keys).clone()
    kv.pages.zero_()
    assert torch.equal(bits(keys), keys_before), "copies"


@layouts
@pytest.mark.parametrize("page_size", [4, 2, 1])
def test_every_page_of_the_blocks_occurs_once(layout, page_size):
    kv = PagedKV.from_layers(make_layers(layout, 4, 2, torch.float32), page_size)
    pages = kv.block_pages(range(BLOCKS)).flatten()
    assert sorted(pages.tolist()) == list(range(LAYERS * BLOCKS * HEADS * 4 // page_size))


@pytest.mark.parametrize(("block", "page"), [(16, 16), (128, 16), (784, 16), (1, 1), (40, 40)])
def test_blocks_are_divided_into_small_pages(block, page):
    assert page_slots(block) == page


def test_layers_of_different_allocations_are_refused():
    layers = make_layers("LBHNC", 4, 2, torch.float32)
    with pytest.raises(ValueError, match="one allocation"):
        PagedKV.from_layers([layers[0], layers[1].clone()])
    with pytest.raises(ValueError, match="head-major"):
        PagedKV.from_layers([cache.transpose(1, 2) for cache in layers])


def test_page_table_holds_every_list():
    lists = [torch.tensor(ids, dtype=torch.int64) for ids in ([7, 3], [], [9], [1, 2, 8])]
    table = page_table(lists)
    assert table.dtype == torch.int32
    got = [table[table[h] : table[h + 1]].tolist() for h in range(len(lists))]
    assert got == [ids.tolist() for ids in lists]


@layouts
@dtypes
@pytest.mark.parametrize(
    ("block_size", "lengths", "counts"),
    [
        (8, [13, 13, 13, 13, 13, 13], [2] * 6),
        (8, [16, 1, 7, 30, 0, 8], [2, 1, 1, 4, 0, 1]),
        (1, [3, 2, 3, 0, 1, 1], [3, 2, 3, 0, 1, 1]),
        (16, [5, 5, 5, 5, 5, 20], [2, 1, 1, 1, 1, 2]),
    ],
    ids=["uniform", "ragged", "block-of-one", "spare-page"],
)
def test_museum_7_write_pages_writes_its_pages_and_nothing_else(
    layout, dtype, block_size, lengths, counts
):
    """Heads' pages lie in any layer's storage, in any order."""
    dim = 5
    kv = PagedKV.from_layers(make_layers(layout, block_size, dim, dtype))
    kv.bias.copy_(torch.arange(kv.bias.numel()).view_as(kv.bias))
    before, bias_before = bits(kv.pages).clone(), kv.bias.clone()
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(kv.pages), generator=generator)
    lists = list(order[: sum(counts)].split(counts))
    compacted = compacted_kv(lengths, dim, dtype)
    write_pages(kv, lists, compacted)

    others = order[sum(counts) :]
    assert len(others) > 0
    assert torch.equal(bits(kv.pages)[others], before[others])
    assert torch.equal(kv.bias[others], bias_before[others])
    for head, (ids, length) in enumerate(zip(lists, lengths, strict=True)):
        for index in range(len(ids) * block_size):
            page, offset = ids[index // block_size], index % block_size
            if index < length:
                entry = torch.cat([compacted.keys[head, index], compacted.values[head, index]])
                assert torch.equal(bits(kv.pages[page, offset]), bits(entry))
                assert kv.bias[page, offset] == compacted.bias[head, index]
            else:
                assert kv.bias[page, offset] == -torch.inf
                assert kv.pages[page, offset].isfinite().all()  # 0 x NaN would be NaN


def test_too_few_pages_is_an_error_and_writes_nothing():
    kv = PagedKV.from_layers(make_layers("LBHNC", 8, 4, torch.float32))
    before = bits(kv.pages).clone()
    lists = [torch.tensor([3, 4]), torch.tensor([10])]
    with pytest.raises(ValueError, match="cannot hold"):
        write_pages(kv, lists, compacted_kv([9, 9], 4, torch.float32))
    assert torch.equal(bits(kv.pages), before) and not kv.bias.any()


def test_segments_are_read_as_they_were_written():
    """Heads of different length are padded with nothing, whatever lies in the other pages."""
    kv = PagedKV.from_layers(make_layers("LBHNC", 4, 5, torch.float32))
    kv.pages.fill_(torch.nan)
    written = compacted_kv([6, 0, 3], 5, torch.float32)
    lists = [torch.tensor([9, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([5])]
    write_pages(kv, lists, written)
    keys, values, bias = read_segments(kv, torch.tensor([[9, 2], [-1, -1], [5, -1]]))
    assert keys.shape == values.shape == (3, 8, 5)
    for head, length in enumerate(written.lengths.tolist()):
        assert torch.equal(keys[head, :length], written.keys[head, :length])
        assert torch.equal(values[head, :length], written.values[head, :length])
        assert torch.equal(bias[head, :length], written.bias[head, :length])
        assert bool(bias[head, length:].isneginf().all())
        assert not bool(keys[head, length:].any()) and not bool(values[head, length:].any())
