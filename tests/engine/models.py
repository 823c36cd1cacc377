"""A tiny random model for engine tests: HF layout, outputs that depend on the whole context."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def make_random_model(
    path: Path, max_positions: int = 65536, head_dim: int = 32, kv_heads: int = 2
) -> Path:
    """Write a small Qwen3 with random weights and a word tokenizer ("w0 w1 ...") to ``path``.

    Untied embeddings and a large initialisation: with vLLM's usual dummy weights (or tied
    embeddings) a model repeats one token whatever it is given, and equality tests prove nothing.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        initializer_range=0.11,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.mul_(1.5)
            layer.self_attn.k_norm.weight.mul_(1.5)
            layer.self_attn.o_proj.weight.mul_(3)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


#: Sizes that all of these families share.
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.11,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 1,
}


def make_family_model(path: Path, family: str, layers: int = 3, **options: Any) -> Path:
    """Write a small model with random weights.

    Args:
        family: as transformers' classes are called: "Olmo3" of Olmo3Config, Olmo3ForCausalLM.
        options: further fields of its configuration.
    """
    import transformers

    torch.manual_seed(2)
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, "num_hidden_layers": layers, **options}
    )
    name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family.removesuffix('Text')}ForCausalLM")
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("self_attn.o_proj.weight"):
                weight.mul_(3)
            if name.endswith("self_attn.sinks"):
                weight.uniform_(-3, 5)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


#: Families of which some layers have a sliding window, with fields of their own.
HYBRIDS: dict[str, dict[str, Any]] = {
    "Gemma3Text": {"query_pre_attn_scalar": 32},
    "Olmo3": {},
    "Cohere2": {"logit_scale": 1.0},
    "Exaone4": {"sliding_window_pattern": 3},
    # Attention sinks, too. vLLM goes by the number of a layer, whatever its type is said to be.
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
}


def make_hybrid_model(path: Path, family: str, layers: int = 6, window: int = 96) -> Path:
    """The same, with full attention in every third layer only, from the first on."""
    kinds = ["sliding_attention" if i % 3 else "full_attention" for i in range(layers)]
    options = {"sliding_window": window, "layer_types": kinds, **HYBRIDS[family]}
    return make_family_model(path, family, layers, **options)


#: Families of which some layers hold a state, with fields of their own.
STATES: dict[str, dict[str, Any]] = {
    # State space (Mamba 2).
    "GraniteMoeHybrid": {
        **{"num_attention_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16},
        **{"mamba_expand": 2, "num_local_experts": 0, "shared_intermediate_size": 256},
        "layer_types": ["full_attention", "linear_attention", "linear_attention"] * 2,
    },
    # The same in parallel with attention, in every layer.
    "FalconH1": {
        **{"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
        **{"mamba_n_groups": 1},
    },
    # A layer is one of the three: "*" attention, "M" state space, "-" MLP.
    "NemotronH": {
        **{"hybrid_override_pattern": "*-M*-M", "mamba_num_heads": 8, "mamba_head_dim": 32},
        **{"ssm_state_size": 16, "n_groups": 1},
    },
    # Linear attention; vLLM's CPU kernel for it wants heads of 128.
    "Qwen3Next": {
        **{"head_dim": 128, "num_attention_heads": 4, "partial_rotary_factor": 0.25},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
        # All of the experts: rounding could change a choice.
        **{"num_experts": 2, "num_experts_per_tok": 2, "norm_topk_prob": True},
        **{"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        "layer_types": ["full_attention", "linear_attention", "linear_attention"] * 2,
    },
}


def make_state_model(path: Path, family: str, layers: int = 6) -> Path:
    """The same, with full attention in some layers and a state in others."""
    return make_family_model(path, family, layers, **STATES[family])


def write_tokenizer(path: Path, names: Mapping[int, str] | None = None) -> Any:
    """One token per word.

    Args:
        names: of tokens that are called otherwise than "w0", "w1" ...; special ones.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = names or {}
    vocabulary = {names.get(i, f"w{i}"): i for i in range(512)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    words.add_special_tokens(list(names.values()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="w0",
        eos_token="w1",
        additional_special_tokens=list(names.values()),
    )
    tokenizer.save_pretrained(path)
    return tokenizer
