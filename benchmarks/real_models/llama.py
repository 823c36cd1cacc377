"""From a GGUF file of the Llama architecture to a folder of the Hugging Face format.

The weights are dequantised to bfloat16: what is served is the quantised model, exactly as far as
its numbers fit there. GGUF keeps query and key rows in the order of the other rotary convention
(pairs of neighbours); they are put back into that of transformers (first and second half).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
#: ``tokenizer.ggml.token_type`` of special tokens.
_CONTROL = 3


def convert(source: Path, folder: Path) -> None:
    """Write config, tokenizer and weights.

    Args:
        source: a GGUF file of the Llama architecture with a byte-level BPE tokenizer.
        folder: made; must not exist.

    Raises:
        ValueError: the file is of another kind.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    kind = fields["general.architecture"], fields["tokenizer.ggml.model"]
    if kind != ("llama", "gpt2"):
        raise ValueError(f"{source.name}: architecture and tokenizer are {kind}, not llama, gpt2")
    folder.mkdir()
    weights = dict(_weights(reader, fields))
    config = _config(fields, tied="lm_head.weight" not in weights)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(fields, folder)


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": fields["llama.block_count"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "vocab_size": fields["llama.vocab_size"],
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def _weights(reader: Any, fields: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and bfloat16 tensor."""
    from gguf.quants import dequantize

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for packed in reader.tensors:
        tensor = torch.from_numpy(dequantize(packed.data, packed.tensor_type).copy())
        parts = packed.name.split(".")
        if parts[0] == "blk":
            _, layer, part, last = parts
            if part in heads:
                tensor = split_halves(tensor, heads[part])
            name = f"model.layers.{layer}.{_LAYER[part]}.{last}"
        else:
            part, last = parts
            name = f"{_OTHERS[part]}.{last}"
        yield name, tensor.to(torch.bfloat16)


def split_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * D, ...] in pairs of neighbours, put into first and second half of each head."""
    paired = rows.unflatten(0, (heads, -1, 2))  # [heads, D / 2, 2, ...]
    return paired.transpose(1, 2).reshape(rows.shape)


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    special = [token for token, kind in kinds if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=fields["llama.context_length"],
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    fast.save_pretrained(folder)
