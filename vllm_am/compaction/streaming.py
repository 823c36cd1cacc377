"""How big problems are cut into blocks, so that no [N, T] matrix over all queries ever exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

#: Size of the largest temporary. On a CPU core at T=4096 anything from 2 to 64 MiB is equally fast.
#: A GPU needs more to be busy.
DEFAULT_CHUNK_BYTES = 8 << 20

#: Below this many query rows a matrix product is starved, so heads are split before rows.
_MIN_ROWS = 256

#: Batches of Gram matrices may be this big whatever the chunk size; solvers hold a few copies.
_GRAM_BYTES = {"cpu": 64 << 20}
#: On a GPU a batch is one launch of the box solver, in which each head has a multiprocessor.
_GRAM_BYTES_ELSEWHERE = 256 << 20


_between_blocks: ContextVar[Callable[[], None] | None] = ContextVar("between_blocks", default=None)


def pause_point() -> None:
    """Between two blocks of a long computation: who has asked for it may do something else here."""
    if (pause := _between_blocks.get()) is not None:
        pause()


@contextmanager
def pausing(pause: Callable[[], None]) -> Iterator[None]:
    """Call ``pause`` at every :func:`pause_point` of this context."""
    token = _between_blocks.set(pause)
    try:
        yield
    finally:
        _between_blocks.reset(token)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's where the work is; the host does not wait for what is queued there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32: nothing is ever summed in 16 bit."""
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def head_blocks(heads: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of heads such that ``_MIN_ROWS`` rows of ``row_bytes`` per head fit the budget."""
    step = max(1, chunk_bytes // max(1, _MIN_ROWS * row_bytes))
    for start in range(0, heads, step):
        yield slice(start, min(start + step, heads))
        pause_point()


def row_blocks(rows: int, heads: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of query rows such that a [heads, rows, columns] temporary fits the budget."""
    step = max(1, chunk_bytes // max(1, heads * row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
        pause_point()


def gram_blocks(heads: int, size: int, chunk_bytes: int, device: torch.device) -> Iterator[slice]:
    """Slices of heads whose [size, size] fp64 matrices are solved as one batch."""
    room = max(chunk_bytes, _GRAM_BYTES.get(device.type, _GRAM_BYTES_ELSEWHERE))
    step = max(1, room // max(1, size * size * 8))
    for start in range(0, heads, step):
        yield slice(start, min(start + step, heads))
        pause_point()
