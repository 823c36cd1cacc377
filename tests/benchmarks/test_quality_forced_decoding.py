"""Teacher forcing by a logits processor: rows of the batch come, go and move."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from benchmarks.quality.forced_decoding import FORCED_TOKENS, ForcedTokens


def _params(*tokens):
    return SamplingParams(max_tokens=len(tokens), extra_args={FORCED_TOKENS: list(tokens)})


def _update(processor, added=(), removed=(), moved=()):
    processor.update_state(BatchUpdate(8, removed=removed, added=added, moved=moved))


def _chosen(processor, rows):
    logits = torch.arange(10.0).repeat(rows, 1)
    return processor.apply(logits).argmax(dim=1).tolist()


@pytest.fixture
def processor():
    return ForcedTokens(None, torch.device("cpu"), False)


def test_tokens_are_forced_one_after_the_other(processor):
    output: list[int] = []
    _update(processor, added=[(0, _params(3, 5), None, output), (1, SamplingParams(), None, [])])
    assert _chosen(processor, 2) == [3, 9], "a request without forced tokens is left alone"
    output.append(3)
    processor.update_state(None)
    assert _chosen(processor, 2) == [5, 9]
    assert not processor.is_argmax_invariant()


def test_rows_move(processor):
    _update(processor, added=[(i, _params(i + 1), None, []) for i in range(3)])
    _update(processor, moved=[(0, 2, MoveDirectionality.SWAP)])
    assert _chosen(processor, 3) == [3, 2, 1]
    _update(processor, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert _chosen(processor, 3) == [1, 2, 9]
    _update(processor, added=[(0, SamplingParams(), None, [])])
    assert _chosen(processor, 3) == [9, 2, 9], "a new request does not inherit its row's tokens"


def test_lengths_have_to_agree():
    wrong = SamplingParams(max_tokens=3, extra_args={FORCED_TOKENS: [1]})
    with pytest.raises(ValueError, match="1 tokens for max_tokens=3"):
        ForcedTokens.validate_params(wrong)
    ForcedTokens.validate_params(SamplingParams())
    ForcedTokens.validate_params(_params(1, 2))
