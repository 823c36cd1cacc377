"""Which rows of a batch are compacted, where their pages are, which queries are kept: on the GPU.

vLLM symbols read: ``v1.attention.backend.CommonAttentionMetadata`` (nothing is patched).

The host knows which request is in which row, which span of it is compacted and where its page table
lies; only the device knows the exact lengths (async scheduling). So the host writes one packed
array per step, copied without waiting for the device, and a kernel derives from it and from vLLM's
tables what FlashAttention is to see.

All results lie in buffers that are allocated once: CUDA graphs read them where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_am.engine.messages import QuerySample
from vllm_am.engine.worker.state import WorkerState
from vllm_am.kernels.attention import RowTables
from vllm_am.kernels.live_tables import live_tables

#: Words before the addresses: what follows stays aligned to 16 bytes.
_HEAD = 2


@dataclass(frozen=True)
class HostRows:
    """The rows of one batch, as the host knows them."""

    page_tables: np.ndarray
    """int64 [rows]: device address of the row's page table, or 0 if nothing of it is compacted."""
    gaps: np.ndarray
    """int32 [rows, 2]: blocks [first, last) that are compacted; (0, 0) for none."""
    capture_slots: np.ndarray
    """int64 [tokens]: slot of the query pool that keeps the token's query, or -1."""

    @property
    def compacted(self) -> bool:
        """Whether any row is compacted."""
        return bool(self.page_tables.any())

    @property
    def captured(self) -> bool:
        """Whether any query is kept."""
        return bool((self.capture_slots >= 0).any())

    @classmethod
    def of(cls, state: WorkerState, common: CommonAttentionMetadata, block_size: int) -> HostRows:
        """Look the rows of a batch up; padding and dummy rows are not anybody's."""
        rows, tokens = common.num_reqs, common.num_actual_tokens
        host = cls(
            page_tables=np.zeros(rows, dtype=np.int64),
            gaps=np.zeros((rows, 2), dtype=np.int32),
            capture_slots=np.full(tokens, -1, dtype=np.int64),
        )
        samples = state.step.samples if state.step is not None else {}
        if not state.sequences and not samples:
            return host
        # Collected in lists: an assignment to an array costs more than all else here.
        sequences: dict[int, tuple[int, int, int]] = {}
        sampled: dict[int, QuerySample] = {}
        for row, request_id in enumerate(state.row_request_ids(common.req_idx, rows)):
            if request_id is None:
                continue
            if (sequence := state.sequences.get(request_id)) is not None:
                sequences[row] = sequence.table.data_ptr(), sequence.start, sequence.end
            if (sample := samples.get(request_id)) is not None:
                sampled[row] = sample
        if sequences:
            found = np.array(list(sequences.values()), dtype=np.int64)
            host.page_tables[list(sequences)] = found[:, 0]
            host.gaps[list(sequences)] = found[:, 1:] // block_size
        if sampled:
            starts = common.query_start_loc_cpu.numpy()[list(sampled)]
            counts = [len(sample.offsets) for sample in sampled.values()]
            offsets = np.concatenate([sample.offsets for sample in sampled.values()])
            slots = np.concatenate([sample.slots for sample in sampled.values()])
            host.capture_slots[np.repeat(starts, counts) + offsets] = slots
        return host

    def longest(self, common: CommonAttentionMetadata, block_size: int) -> int:
        """Upper bound of the rows' live lengths, without asking the device."""
        bounds = common.seq_lens_cpu_upper_bound
        if bounds is None or not self.compacted:
            return common.max_seq_len
        gaps = (self.gaps[:, 1] - self.gaps[:, 0]) * block_size
        return max(1, int((bounds.numpy()[: len(gaps)] - gaps).max()))


class LiveBatch:
    """Device buffers for the batch at hand, made once, before graphs are captured.

    What a row's page table address points to is owned by ``WorkerState.sequences``. It may be
    dropped there while kernels that read it are still queued: its memory goes back to PyTorch's
    allocator, which hands it out again only to work that is queued behind them on this stream.

    Args:
        max_rows: rows of the largest batch.
        max_tokens: tokens of the largest batch.
        table_width: entries of a row of vLLM's block table.
        block_size: tokens per block.
        device: where.
    """

    def __init__(
        self,
        max_rows: int,
        max_tokens: int,
        table_width: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        # One array, so that one copy fills it: whether there is anything to do, addresses, gaps
        # (two int32 each), capture slots.
        size = _HEAD + 2 * max_rows + max_tokens
        self._packed = torch.zeros(size, dtype=torch.int64, device=device)
        self.active = self._packed[:1].view(torch.int32)[:1]
        self.page_tables, gaps = self._packed[_HEAD:][: 2 * max_rows].split(max_rows)
        self.gaps = gaps.view(torch.int32).view(-1, 2)
        self.capture_slots = self._packed[_HEAD + 2 * max_rows :].fill_(-1)
        self.block_table = torch.zeros(max_rows, table_width, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + self.block_table.nbytes + self.seq_lens.nbytes

    def upload(self, host: HostRows) -> None:
        """Copy a batch's rows to the device; the host does not wait.

        Raises:
            ValueError: the batch is larger than the buffers.
        """
        max_rows, rows = len(self.page_tables), len(host.page_tables)
        if rows > max_rows or len(host.capture_slots) > len(self.capture_slots):
            raise ValueError(
                f"{rows} rows with {len(host.capture_slots)} tokens, buffers for {max_rows} rows "
                f"with {len(self.capture_slots)} tokens"
            )
        packed = np.zeros(_HEAD + 2 * max_rows + len(host.capture_slots), dtype=np.int64)
        packed[0] = host.compacted or host.captured
        body = packed[_HEAD:]
        body[:rows] = host.page_tables
        body[max_rows : max_rows + rows] = host.gaps.reshape(-1).view(np.int64)
        body[2 * max_rows :] = host.capture_slots
        # Staged in pinned memory of its own, which is reused once the copy is done: an array kept
        # here would be overwritten by the next step while this step's copy is still queued.
        async_tensor_h2d(packed, out=self._packed[: len(packed)])

    def shorten(self, common: CommonAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the compacted blocks out of vLLM's tables; after :meth:`upload`.

        Returns:
            block table int32 [rows, width] and lengths int32 [rows], views of the buffers.
        """
        rows = common.num_reqs
        block_table, seq_lens = self.block_table[:rows], self.seq_lens[:rows]
        live_tables(
            common.block_table_tensor[:rows],
            common.seq_lens[:rows],
            self.gaps[:rows],
            block_table,
            seq_lens,
            self.page_tables[:rows],
            num_rows=rows,
            block_size=self.block_size,
        )
        return block_table, seq_lens

    def rows(self, common: CommonAttentionMetadata) -> RowTables:
        """The batch's rows for ``attend_compacted``."""
        rows = common.num_reqs
        return RowTables(
            common.query_start_loc[: rows + 1], self.page_tables[:rows], active=self.active
        )

    def warm_up(self) -> None:
        """Compile the kernel of :meth:`shorten`, on an empty row."""
        one = slice(0, 1)
        live_tables(
            self.block_table[one],
            self.seq_lens[one],
            self.gaps[one],
            self.block_table[one],
            self.seq_lens[one],
            self.page_tables[one],
            num_rows=1,
            block_size=self.block_size,
        )
