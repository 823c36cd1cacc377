"""The method alone, on plain tensors: no vLLM, no model, no GPU.

python examples/plain_tensors.py
"""

from __future__ import annotations

import torch

# --8<-- [start:import]
from vllm_am import compact

# --8<-- [end:import]

torch.manual_seed(0)
heads, tokens, reference, size = 2, 1024, 512, 64
topics = torch.randn(heads, 16, size)  # keys that resemble each other, as a model's do
keys = topics[:, torch.randint(16, (tokens,))] + 0.3 * torch.randn(heads, tokens, size)
values = torch.randn(heads, tokens, size)
queries = 2 * topics[:, torch.randint(16, (reference,))] + torch.randn(heads, reference, size)

# --8<-- [start:compact]
compacted = compact(keys, values, queries, ratio=0.05)  # [H, T, D], [H, T, D], [H, N, D]
# [H, t, D], [H, t], [H, t, D]
kept, bias, fitted = compacted.keys, compacted.bias, compacted.values
# --8<-- [end:compact]

scale = size**-0.5
exact = torch.softmax(queries @ keys.mT * scale, -1) @ values
close = torch.softmax(queries @ kept.mT * scale + bias[:, None], -1) @ fitted
error = (close - exact).norm() / exact.norm()
print(f"{tokens} keys -> {kept.shape[1]} per head; relative error {error:.3f}")
