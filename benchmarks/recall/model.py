"""Qwen3 in plain PyTorch, with the parameter names of transformers, and its export.

Shapes: B sequences, T tokens, D hidden size, H query heads, K key/value heads, E head size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; the defaults are the bundled one."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rope_tables(length: int, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, [length, E] each."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.outer(torch.arange(length).float(), config.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, e = config.hidden_size, config.head_dim
        h, k = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = e
        self.q_proj = nn.Linear(d, h * e, bias=False)
        self.k_proj = nn.Linear(d, k * e, bias=False)
        self.v_proj = nn.Linear(d, k * e, bias=False)
        self.o_proj = nn.Linear(h * e, d, bias=False)
        self.q_norm = RMSNorm(e, config.rms_norm_eps)
        self.k_norm = RMSNorm(e, config.rms_norm_eps)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] to rotated queries [B, H, T, E], rotated keys and values [B, K, T, E]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        return _rotate(q, rope), _rotate(k, rope), v

    def output(self, heads: Tensor) -> Tensor:
        """Head outputs [B, H, T, E] to [B, T, D]."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.project(x, rope)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return self.output(F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True))


class MLP(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class RecallModel(nn.Module):
    """Qwen3 with embeddings tied to the output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to final hidden states [B, T, D]."""
        rope = rope_tables(ids.shape[1], self.config)
        x = self.embed_tokens(ids)
        for layer in self.blocks():
            x = layer(x, rope)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., vocabulary]."""
        return hidden @ self.embed_tokens.weight.T


def export(model: RecallModel, folder: Path, dtype: torch.dtype, eos: int, pad: int) -> None:
    """Write configuration and weights as transformers lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    c = model.config
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": 32768,
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    generation = {"do_sample": False, "eos_token_id": eos, "pad_token_id": pad}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {f"model.{name}": w.to(dtype).contiguous() for name, w in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> RecallModel:
    """Read an exported folder back, in float32."""
    written = json.loads((folder / "config.json").read_text())
    fields = ModelConfig.__dataclass_fields__
    model = RecallModel(ModelConfig(**{k: v for k, v in written.items() if k in fields}))
    weights = load_file(folder / "model.safetensors")
    state = {name.removeprefix("model."): w.float() for name, w in weights.items()}
    model.load_state_dict(state)
    return model.eval()
