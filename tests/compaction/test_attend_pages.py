"""Attention over the pages of a batch against attention over what they hold."""

import random
import sys

import pytest
import torch

from vllm_am.compaction import attend_pages as module
from vllm_am.compaction.attend import attend, causal_mask
from vllm_am.compaction.attend_pages import PagedRow, attend_pages, group_rows
from vllm_am.compaction.pages import PagedKV
from vllm_am.kernels.attend_pages import MOST_NEW, PageAttention
from vllm_am.kernels.cpu_library import library

LAYERS, BLOCKS, BLOCK = 2, 40, 4
pages = pytest.mark.parametrize("page", [BLOCK, 2, 1], ids="pages-of-{}".format)


def make_cache(heads, dim, dtype=torch.float32, page=BLOCK):
    store = torch.randn(BLOCKS, LAYERS, heads, BLOCK, 2 * dim).to(dtype)
    kv = PagedKV.from_layers([store[:, layer] for layer in range(LAYERS)], page)
    kv.bias.normal_()
    return kv


def make_rows(kv, lengths, news, compacted):
    """Rows on blocks of their own; ``compacted[r]`` blocks at most for a head, or None."""
    blocks = iter(random.sample(range(BLOCKS), BLOCKS))
    rows, first = [], 0
    for length, new, most in zip(lengths, news, compacted, strict=True):
        mine = torch.tensor([next(blocks) for _ in range(-(-length // BLOCK))])
        pages = None
        if most is not None:
            pool = kv.block_pages([next(blocks) for _ in range(most)])  # [heads, most]
            most = pool.shape[1]
            counts = [random.randint(0, most) for _ in range(len(pool) - 1)] + [most]
            pages = torch.full(pool.shape, -1)
            for head, count in enumerate(counts):
                pages[head, :count] = pool[head, :count]
                if count:
                    kv.bias[pool[head, count - 1], kv.page_size // 2 :] = -torch.inf  # not used
        rows.append(PagedRow(first, first + new, mine, length, pages))
        first += new
    return rows


def expected(queries, kv, row, layer, scale, sinks=None):
    """[new, query heads, D] of one row, head by head."""
    heads, group = kv.num_kv_heads, queries.shape[1] // kv.num_kv_heads
    out = torch.empty(queries.shape)
    for head in range(heads):
        pages = kv.block_pages(row.blocks)[layer * heads + head]
        entries = kv.pages[pages].flatten(0, 1)[: row.live_tokens]
        bias = torch.zeros(row.live_tokens)
        if row.compacted is not None:
            more = row.compacted[layer * heads + head]
            more = more[more >= 0]
            entries = torch.cat([entries, kv.pages[more].flatten(0, 1)])
            bias = torch.cat([bias, kv.bias[more].flatten()])
        sees = torch.ones(row.new, len(entries), dtype=torch.bool)
        sees[:, : row.live_tokens] = causal_mask(row.new, row.live_tokens)
        keys, values = entries.chunk(2, dim=1)
        for member in range(head * group, (head + 1) * group):
            q = queries[row.first : row.last, member]
            one, lse = attend(q, keys, values, bias, scale=scale, mask=sees)
            if sinks is not None:  # one more key, whose value is zero
                one = one * torch.sigmoid(lse - sinks[member]).unsqueeze(1)
            out[row.first : row.last, member] = one
    return out[row.first : row.last]


CASES = {
    "one token": ([1], [1], [None]),
    "decodes": ([9, 1, 8, 5], [1, 1, 1, 1], [None, None, None, None]),
    "compacted decodes": ([9, 1, 8, 5], [1, 1, 1, 1], [3, 1, 2, 0]),
    "prefill": ([13], [13], [None]),
    "chunk of a prefill": ([22], [7], [None]),
    "chunk of a compacted prefill": ([22], [7], [2]),
    "two alike": ([9, 9], [3, 3], [1, 1]),
    "two prefills": ([9, 11], [3, 3], [None, None]),
    "everything": ([17, 9, 5, 1, 12, 6], [1, 9, 2, 1, 1, 2], [2, None, 1, None, 3, 1]),
}


def attend_all(queries, kv, rows, layer, scale, kernel, sinks=None):
    """Of a batch, by the compiled kernel or by its reference."""
    out = torch.full_like(queries, torch.nan)
    options = {"scale": scale, "sinks": sinks}
    if kernel:
        PageAttention(rows, kv, queries.shape[1])(queries, out, layer, **options)
        return out
    for each in group_rows(rows, kv):
        out[each.queries] = attend_pages(queries[each.queries], kv, each, layer, **options)
    return out


@pytest.fixture(params=[0, 1, 3], ids=["torch", "compiled", "compiled-3-threads"])
def kernel(request):
    """Whether the compiled kernel attends; it shares its work among torch's threads."""
    if not request.param:
        yield False
        return
    if library() is None:
        pytest.skip("no compiler")
    # Not torch.set_num_threads: an engine that ran in this process has made that a no-op.
    before = torch.get_num_threads()
    torch._C.set_num_threads(request.param)
    assert torch.get_num_threads() == request.param
    yield True
    torch._C.set_num_threads(before)


@pytest.mark.parametrize("dim", [8, 20])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("case", CASES)
@pages
def test_equals_attention_over_what_is_held(page, case, group, dim, kernel, monkeypatch):
    random.seed(len(case))
    torch.manual_seed(0)
    monkeypatch.setattr(module, "QUERY_CHUNK", 4)
    heads, scale = 2, 0.3
    kv = make_cache(heads, dim, page=page)
    rows = make_rows(kv, *CASES[case])
    queries = torch.randn(sum(CASES[case][1]), heads * group, dim)
    for layer in range(LAYERS):
        out = attend_all(queries, kv, rows, layer, scale, kernel)
        for row in rows:
            wanted = expected(queries, kv, row, layer, scale)
            torch.testing.assert_close(out[row.first : row.last], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_sinks_are_keys_without_a_value(case, kernel, monkeypatch):
    """That nothing outweighs, that weigh nothing, that do not exist."""
    random.seed(len(case))
    torch.manual_seed(1)
    monkeypatch.setattr(module, "QUERY_CHUNK", 4)
    heads, scale = 2, 0.3
    kv = make_cache(heads, 8)
    rows = make_rows(kv, *CASES[case])
    queries = torch.randn(sum(CASES[case][1]), heads * 3, 8)
    sinks = torch.tensor([0.5, 10.0, -10.0, 200.0, -torch.inf, -1.0])
    out = attend_all(queries, kv, rows, 1, scale, kernel, sinks)
    assert out[:, 3].abs().max() < 1e-6
    for row in rows:
        wanted = expected(queries, kv, row, 1, scale, sinks)
        torch.testing.assert_close(out[row.first : row.last], wanted, rtol=1e-5, atol=1e-5)
    none = attend_all(queries, kv, rows, 1, scale, kernel)
    torch.testing.assert_close(out[:, 4], none[:, 4], rtol=1e-5, atol=1e-5)


@pages
@pytest.mark.parametrize("compacted", [None, 2])
def test_what_others_left_behind_is_not_seen(compacted, page, kernel):
    """Behind the last token of a block lies what was there before: not-a-number, at worst."""
    kv = make_cache(2, 8, page=page)
    rows = make_rows(kv, [9, 2], [1, 1], [compacted, compacted])
    queries = torch.randn(2, 4, 8)
    clean = attend_all(queries, kv, rows, 0, 0.3, kernel)
    mine = torch.cat([kv.block_pages(row.blocks).flatten() for row in rows])
    others = torch.ones(len(kv.pages), dtype=torch.bool)
    others[mine] = False
    for row in rows:
        if row.compacted is not None:
            # Of layer 0: in the midst of a fit, the pages of later layers are not written yet.
            lists = row.compacted[: kv.num_kv_heads]
            others[lists[lists >= 0]] = False
        behind = torch.arange(row.live_tokens, len(row.blocks) * BLOCK)
        kv.pages[kv.block_pages(row.blocks)[:, behind // page], behind % page] = torch.nan
    kv.pages[others] = torch.nan
    kv.bias[others] = torch.nan
    assert torch.equal(attend_all(queries, kv, rows, 0, 0.3, kernel), clean)


def test_what_is_not_a_number_is_not_hidden(kernel):
    kv = make_cache(2, 8)
    rows = make_rows(kv, [9, 9], [1, 1], [None, None])
    kv.pages[kv.block_pages(rows[0].blocks)[0, 1], 2, 0] = torch.nan  # a key of head 0
    out = attend_all(torch.randn(2, 4, 8), kv, rows, 0, 0.3, kernel)
    assert out[0, :2].isnan().all()
    assert out[0, 2:].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_long_sequences_in_parts(dim, dtype, kernel, monkeypatch):
    """Many pages to a head, cut into parts that threads share; scores of any size."""
    monkeypatch.setattr(sys.modules[__name__], "BLOCKS", 400)
    random.seed(dim)
    torch.manual_seed(dim)
    kv = make_cache(2, dim, dtype)
    rows = make_rows(kv, [700, 3, 130, 1], [2, 1, 8, 1], [30, None, 90, 4])
    queries = (4 * torch.randn(12, 8, dim)).to(dtype)
    wide = PagedKV(kv.pages.float(), kv.bias, kv.layer_bases, kv.block_stride, kv.num_kv_heads)
    out = attend_all(queries, kv, rows, 1, 0.5, kernel)
    # Scores reach 100, whose float32 rounding is 1e-5 and goes through e^x.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for row in rows:
        wanted = expected(queries.float(), wide, row, 1, 0.5)
        mine = out[row.first : row.last].float()
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


def test_half_precision_keeps_the_bias_in_float32(kernel):
    kv = make_cache(2, 8, torch.bfloat16)
    rows = make_rows(kv, [9], [1], [2])
    queries = torch.randn(1, 4, 8).bfloat16()
    out = attend_all(queries, kv, rows, 0, 0.3, kernel)
    wide = PagedKV(kv.pages.float(), kv.bias, kv.layer_bases, kv.block_stride, kv.num_kv_heads)
    wanted = expected(queries.float(), wide, rows[0], 0, 0.3)
    assert torch.equal(out, wanted.bfloat16())


def test_what_the_compiled_kernel_takes(monkeypatch):
    kv, half = make_cache(2, 8), make_cache(2, 8, torch.float16)
    few, many = (PagedRow(0, new, torch.arange(20), 70, None) for new in (MOST_NEW, MOST_NEW + 1))
    assert PageAttention.takes(few, kv) == (library() is not None)
    assert not PageAttention.takes(many, kv), "a prefill chunk: matrix products"
    assert not PageAttention.takes(few, half), "torch knows how"


def test_groups_waste_little_and_stay_small(monkeypatch):
    kv = make_cache(2, 8)
    random.seed(1)
    rows = make_rows(kv, [40, 36, 5, 4, 12], [1, 1, 1, 1, 12], [None, None, None, None, None])
    sizes = [len(group.live_tokens) for group in group_rows(rows, kv)]
    assert sorted(sizes) == [1, 1, 1, 2]  # 10 and 9 pages; 2; 1; the prefill
    page_bytes = kv.num_kv_heads * kv.pages[0].numel() * kv.pages.itemsize
    monkeypatch.setattr(module, "GATHERED_BYTES", 19 * page_bytes)
    assert all(len(group.live_tokens) == 1 for group in group_rows(rows, kv))
