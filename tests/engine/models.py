"""A tiny random model for engine tests: HF layout, outputs that depend on the whole context."""

from __future__ import annotations

from pathlib import Path

import torch


def make_random_model(
    path: Path, max_positions: int = 65536, head_dim: int = 32, kv_heads: int = 2
) -> Path:
    """Write a small Qwen3 with random weights and a word tokenizer ("w0 w1 ...") to ``path``.

    Untied embeddings and a large initialisation: with vLLM's usual dummy weights (or tied
    embeddings) a model repeats one token whatever it is given, and equality tests prove nothing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

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
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(
        path
    )
    return path
