"""Families of models that compaction is proven on: what ``vllm-am models`` prints.

``tests/engine/test_families.py`` and ``test_multimodal.py`` serve tiny models of each of them as
stock vLLM does, token for token, and hold this table against what they prove.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Models that are served alike.

    Attributes:
        name: for people.
        model_types: of their configurations (``model_type``).
        compacted: which of their layers are.
        note: what else a user should know.
    """

    name: str
    model_types: tuple[str, ...]
    compacted: str = "all"
    note: str = ""


FULL_ONLY = "full attention; the others hold their window"
FULL_BESIDE_STATES = "full attention; the others hold their state"
NOT_SHARED = "compacted prefixes are not shared"
IMAGES_EXACT = "requests with images, audio or video stay exact"

FAMILIES = (
    Family("Llama", ("llama",), note="real weights too: SmolLM2-135M"),
    Family("Mistral 7B", ("mistral",), note="windows: where no context exceeds them"),
    Family("Qwen 2, Qwen 3, Qwen 3 MoE", ("qwen2", "qwen3", "qwen3_moe")),
    Family("Phi 3, Phi 4 mini", ("phi3",), note="LongRoPE as well"),
    Family("GLM 4, Granite, GPT-2", ("glm4", "granite", "gpt2")),
    Family(
        "through transformers: Arcee, CWM, GLM, GPT-NeoX, Hunyuan dense, Jais 2, OLMo 1 and 2, "
        "Phi, Seed-OSS, SmolLM3, StarCoder 2",
        (
            *("arcee", "cwm", "glm", "gpt_neox", "hunyuan_v1_dense", "jais2", "olmo", "olmo2"),
            *("phi", "seed_oss", "smollm3", "starcoder2"),
        ),
    ),
    Family("Gemma 3 (text)", ("gemma3_text",), FULL_ONLY),
    Family("OLMo 3", ("olmo3",), FULL_ONLY),
    Family(
        "Command A, Command R7B (Cohere 2); EXAONE 4",
        ("cohere2", "exaone4"),
        FULL_ONLY,
        "no rotation in these layers, so no context-rotated",
    ),
    Family("gpt-oss", ("gpt_oss",), FULL_ONLY, "attention sinks; on GPUs with FlashAttention 3"),
    Family("Qwen3-Next", ("qwen3_next",), FULL_BESIDE_STATES, NOT_SHARED),
    Family("Qwen3.5, Qwen3.6", ("qwen3_5",), FULL_BESIDE_STATES, f"{IMAGES_EXACT}; {NOT_SHARED}"),
    Family("Falcon-H1", ("falcon_h1",), "the attention of all; their state stays", NOT_SHARED),
    Family(
        "Granite 4-H, Nemotron-H",
        ("granitemoehybrid", "nemotron_h"),
        FULL_BESIDE_STATES,
        f"no rotation, so no context-rotated; {NOT_SHARED}",
    ),
    Family("Qwen2.5-VL, Qwen3-VL", ("qwen2_5_vl", "qwen3_vl"), note=IMAGES_EXACT),
    Family("Mistral Small 3, Ministral 3", ("mistral3",), note=IMAGES_EXACT),
    Family("Gemma 3 (4B and more)", ("gemma3",), FULL_ONLY, "with --language-model-only"),
)


def is_proven(hf_config: Any) -> bool:
    """Whether a model is of one of these families.

    Args:
        hf_config: ``ModelConfig.hf_config``.
    """
    return any(hf_config.model_type in family.model_types for family in FAMILIES)


def table() -> str:
    """Markdown, for the documentation."""
    lines = ["| models | layers that are compacted | |", "|---|---|---|"]
    lines += [f"| {f.name} | {f.compacted} | {f.note} |" for f in FAMILIES]
    return "\n".join(lines)
