"""Moving queries to other positions, against rotary embeddings applied there."""

import pytest
import torch

from vllm_am.compaction.rotate_queries import distances_behind, rotate_queries


def rotary(x, positions, inverse_frequencies, interleaved):
    """Rotary embedding with complex numbers: x [..., n, D] before it."""
    rotary = 2 * len(inverse_frequencies)
    head, rest = x[..., :rotary].double(), x[..., rotary:].double()
    if interleaved:
        pairs = torch.complex(head[..., 0::2], head[..., 1::2])
    else:
        pairs = torch.complex(*head.chunk(2, dim=-1))
    angle = torch.outer(positions.double(), inverse_frequencies.double())
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        head = torch.view_as_real(pairs).flatten(-2)
    else:
        head = torch.cat([pairs.real, pairs.imag], -1)
    return torch.cat([head, rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(64, 64), (96, 32), (60, 60)])
def test_equals_the_embedding_at_the_target(width, rotated, interleaved):
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(2, 3, 7, width, generator=generator)
    frequencies = 1e6 ** -(torch.arange(0, rotated, 2) / rotated)
    positions = torch.tensor([0, 1, 5, 40, 41, 2000, 120_000])
    targets = torch.tensor([9, 1, 500, 0, 41, 130_000, 131_071])
    before = rotary(content, positions, frequencies, interleaved).float()
    untouched = before.clone()
    after = rotate_queries(before, targets - positions, frequencies, interleaved=interleaved)
    assert torch.equal(before, untouched)
    expected = rotary(content, targets, frequencies, interleaved)
    torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(after[..., rotated:], before[..., rotated:])


def test_half_precision_is_rounded_once():
    queries = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    frequencies = 1e4 ** -(torch.arange(0, 64, 2) / 64)
    distances = torch.arange(50) * 100
    narrow = rotate_queries(queries.bfloat16(), distances, frequencies)
    wide = rotate_queries(queries.bfloat16().float(), distances, frequencies)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())


def test_text_moves_behind_its_end_in_one_piece():
    positions = torch.tensor([16, 17, 30, 99, 100, 105])
    moved = positions + distances_behind(positions, 100)
    assert moved.tolist() == [100, 101, 114, 183, 100, 105]
    assert distances_behind(positions[:0], 100).shape == (0,)


def test_refuses_mismatches():
    with pytest.raises(ValueError, match="inverse_frequencies"):
        rotate_queries(torch.zeros(3, 8), torch.zeros(3), torch.zeros(5))
    with pytest.raises(ValueError, match="distances"):
        rotate_queries(torch.zeros(3, 8), torch.zeros(2), torch.zeros(4))
