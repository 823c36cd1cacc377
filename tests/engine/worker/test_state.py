"""What a worker derives from the configuration for its own layers and heads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_am.engine.worker import state as worker_state

SHARES = {"L0H0": 0.1, "L0H1": 0.2, "L1H0": 0.3, "L1H1": 0.4, "L1H2": 0.0, "L1H3": 0.0}
#: KV heads of the model, ranks, this rank, its layers, its shares.
CASES = {
    "all": (2, 1, 0, [0, 1], [0.1, 0.2, 0.3, 0.4]),
    "own-heads": (2, 2, 1, [0, 1], [0.2, 0.4]),
    "own-layers": (2, 1, 0, [1], [0.3, 0.4]),
    "head-held-by-two-ranks": (2, 4, 1, [0, 1], [0.1, 0.3]),
    "other-head-held-by-two-ranks": (2, 4, 2, [0, 1], [0.2, 0.4]),
    "nothing-at-all": (4, 2, 1, [1], [1, 1]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_shares_of_a_rank(case, monkeypatch):
    heads, ranks, rank, layers, expected = case
    monkeypatch.setattr(worker_state, "get_tensor_model_parallel_rank", lambda: rank)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(
            get_total_num_kv_heads=lambda: heads,
            get_num_kv_heads=lambda parallel: max(1, heads // parallel.tensor_parallel_size),
        ),
    )
    names = [f"model.layers.{layer}.self_attn.attn" for layer in layers]
    shares = worker_state.local_shares(SHARES, names, config)
    assert shares.tolist() == pytest.approx(expected)


def test_no_file_no_shares():
    assert worker_state.local_shares("global", ["model.layers.0.self_attn.attn"], None) is None
