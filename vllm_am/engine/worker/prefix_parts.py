"""Compacted prefixes to files and back: one rank's heads of one part (``prefix_file.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.logger import init_logger

from vllm_am.compaction.pages import PagedKV, read_pages, write_pages
from vllm_am.engine.footprint import ceil_div
from vllm_am.engine.messages import LoadedPart, PartReport, SavedPart
from vllm_am.engine.prefix_file import PROTECTED, PrefixFile, part_path, write_part
from vllm_am.engine.worker.ranks import summed_over_ranks

logger = init_logger("vllm.kv_compaction")

PageLists = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class ReadSlots:
    """Heads as they were in a file; see ``pages.HeadSlots``."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class PrefixParts:
    """What one rank reads and writes.

    Attributes:
        kv: the pages.
        heads: this rank's, as files call them.
        rank: of all that have heads of the same engine.
    """

    kv: PagedKV
    heads: tuple[str, ...]
    rank: int

    def save(self, part: SavedPart, lists: PageLists | None) -> PartReport:
        """Write this rank's heads of a part.

        Args:
            lists: page lists of the segment; None of the protected tokens.
        """
        failure = None
        try:
            if lists is None:
                lists = tuple(self.kv.block_pages(part.block_ids))
            path = part_path(Path(part.path), part.transfer, part.name, self.rank)
            write_part(path, part.name, dict(zip(self.heads, self._read(part, lists), strict=True)))
        except Exception as error:  # whatever it is, nobody depends on the file
            failure = f"cannot be written ({str(error) or type(error).__name__})"
        return self._agreed(part, failure)

    def _read(self, part: SavedPart, lists: PageLists) -> list[dict[str, torch.Tensor]]:
        found = []
        for pages in lists:
            keys, values = (each[0].cpu() for each in read_pages(self.kv, pages[None]))
            if part.segment_id is None:
                found.append({"keys": keys, "values": values})
                continue
            bias = self.kv.bias[pages].flatten().cpu()
            used = ~bias.isneginf()
            found.append({"keys": keys[used], "values": values[used], "bias": bias[used]})
        return found

    def load(self, part: LoadedPart) -> tuple[PageLists | None, PartReport]:
        """Read this rank's heads of a part into its blocks.

        Returns:
            the page lists, where all ranks have succeeded.
        """
        failure, lists = None, None
        try:
            lists = self._load(part)
        except Exception as error:  # the blocks are nobody's yet
            failure = str(error) or type(error).__name__
        report = self._agreed(part, failure)
        return (None if report.failure else lists), report

    def _load(self, part: LoadedPart) -> PageLists:
        heads = PrefixFile.read(Path(part.path)).read_heads(part.name, self.heads)
        lists = divided(self.kv, part.segment.block_ids, [len(head["keys"]) for head in heads])
        lengths = torch.tensor([len(head["keys"]) for head in heads])
        exact = part.name == PROTECTED
        bias = [h["keys"].new_zeros(len(h["keys"])) if exact else h["bias"] for h in heads]
        device = self.kv.pages.device
        slots = ReadSlots(
            keys=_padded([head["keys"] for head in heads]).to(device),
            values=_padded([head["values"] for head in heads]).to(device),
            bias=_padded([each.float() for each in bias], float("-inf")).to(device),
            lengths=lengths.to(device),
        )
        write_pages(self.kv, lists, slots)
        return lists

    def _agreed(self, part: SavedPart | LoadedPart, failure: str | None) -> PartReport:
        """One failing rank fails the part on all of them."""
        failed = summed_over_ranks(torch.tensor([float(failure is not None)]))
        if bool(failed) and failure is None:
            failure = "a rank has failed; its log says why"
        elif failure is not None:
            logger.warning("KV compaction: %s, part %s: %s", part.path, part.name, failure)
        return PartReport(part.transfer, part.name, failure)


def divided(kv: PagedKV, block_ids: Sequence[int], slots: Sequence[int]) -> PageLists:
    """Pages of blocks for heads of so many slots each, one head behind the other.

    Raises:
        ValueError: they are too few.
    """
    pages = kv.block_pages(block_ids).flatten()
    counts = [ceil_div(count, kv.page_size) for count in slots]
    if sum(counts) > len(pages):
        raise ValueError(f"{sum(counts)} pages are needed, and {len(block_ids)} blocks are too few")
    return pages[: sum(counts)].split(counts)


def _padded(tensors: Sequence[torch.Tensor], value: float = 0.0) -> torch.Tensor:
    return pad_sequence(list(tensors), batch_first=True, padding_value=value)
