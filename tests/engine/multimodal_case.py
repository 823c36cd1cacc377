"""Serves a multimodal class with stock vLLM and with compaction: a program of its own.

Reads ``{"family": ..., "media": bool}`` from standard input, prints what came out on its last line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.engine import driver
from tests.engine.models import SIZES, write_tokenizer

#: Classes of transformers.
CLASSES = ("Qwen2_5_VL", "Qwen3VL", "Gemma3", "Mistral3", "Qwen3_5")
#: Those with linear attention, which vLLM's CPU build runs in bfloat16 alone, with heads of 128:
#: equal but for rounding.
IN_BFLOAT16 = ("Qwen3_5",)
IMAGE, VIDEO, BEGIN, END = 510, 511, 509, 508
#: Of the tokens that stand for media, in Qwen's classes.
MEDIA_TOKENS = {
    IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
    BEGIN: "<|vision_start|>",
    END: "<|vision_end|>",
}
TEXT = {**SIZES, "num_hidden_layers": 3}
VISION = {"hidden_size": 32, "intermediate_size": 32}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}


def config_of(family: str) -> Any:
    """A tiny configuration of a class."""
    import transformers

    if family == "Qwen2_5_VL":
        vision = {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 128, "patch_size": 14}
        text = {**TEXT, "num_attention_heads": 4, "rope_parameters": ROPE}
        return transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, vision_token_id=507, **QWEN_TOKENS
        )
    if family == "Qwen3VL":
        vision = {
            **VISION,
            **{"depth": 2, "num_heads": 2, "out_hidden_size": 128, "patch_size": 16},
            **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        }
        text = {**TEXT, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    if family == "Qwen3_5":
        vision = {
            **VISION,
            **{"depth": 1, "num_heads": 2, "out_hidden_size": 128, "patch_size": 16},
            **{"num_position_embeddings": 16, "deepstack_visual_indexes": []},
        }
        rope = {**ROPE, "mrope_section": [6, 5, 5], "partial_rotary_factor": 0.25}
        text = {
            **{**TEXT, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 128},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
            **{"rope_parameters": {**rope, "mrope_interleaved": True}},
            "layer_types": ["full_attention", "linear_attention"] * 2,
        }
        return transformers.Qwen3_5Config(text_config=text, vision_config=vision, **QWEN_TOKENS)
    vision = {
        **VISION,
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    if family == "Gemma3":
        kinds = ["full_attention", "sliding_attention", "sliding_attention"]
        text = {**TEXT, "layer_types": kinds, "sliding_window": 96, "query_pre_attn_scalar": 32}
        return transformers.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=BEGIN,
            eoi_token_index=END,
        )
    assert family == "Mistral3"
    return transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**vision, "model_type": "pixtral", "head_dim": 16},
        image_token_index=IMAGE,
    )


def make_model(path: Path, family: str) -> None:
    """Weights, tokenizer; of Qwen2.5-VL what prepares images, too."""
    import transformers

    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config_of(family))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("self_attn.o_proj.weight"):
                weight.mul_(3)
    model.save_pretrained(path)
    tokenizer = write_tokenizer(path, MEDIA_TOKENS)
    if family == "Qwen2_5_VL":
        transformers.Qwen2_5_VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(
                patch_size=14, min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16
            ),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(patch_size=14),
        ).save_pretrained(path)


def serve(
    path: Path, kv_compaction: dict[str, Any] | None, media: bool, rounded: bool
) -> dict[str, Any]:
    """Texts, and with ``media`` requests that bring an image; some long ones where ``rounded``."""
    import numpy as np
    from PIL import Image
    from vllm import SamplingParams

    options: dict[str, Any] = {"language_model_only": True, "skip_tokenizer_init": True}
    if media:
        options = {"limit_mm_per_prompt": {"image": 1, "video": 0}}
    asks = driver.mixed_asks(16, seed=3, longest=1300 if rounded else 500)
    if rounded:  # blocks hold a state, whose size depends on what the CPU can do: 160 or 288 tokens
        asks = [replace(ask, max_tokens=4) for ask in asks if len(ask.prompt) > 650][:4]
        options |= {"dtype": "bfloat16", "num_gpu_blocks_override": 80}
    with driver.start(path, kv_compaction, **options) as engine:
        engine.logprobs = 8 if rounded else None
        outputs = dict(engine.run(asks))
        if media:
            pixels = np.random.RandomState(0).randint(0, 255, (84, 84, 3), dtype=np.uint8)
            prompt = [*range(5, 300), BEGIN, IMAGE, END, *range(5, 200)]
            request = {
                "prompt_token_ids": prompt,
                "multi_modal_data": {"image": Image.fromarray(pixels)},
            }
            params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, detokenize=False)
            for name in ("image", "image again"):
                (done,) = engine.llm.generate([request], params)
                outputs[name] = list(done.outputs[0].token_ids)
        result: dict[str, Any] = {"outputs": outputs, "likely": engine.likely}
        if kv_compaction is not None:
            engine.scheduler.check_compaction()
            result |= {
                "compactions": engine.totals.compactions,
                "failures": engine.totals.failures,
                "media_requests": engine.totals.media_requests,
                "used_blocks": engine.used_blocks,
                "rotated": [r is not None for r in engine.worker._compaction.fitting.rotations],
            }
        return result


def main() -> None:
    case = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), case["family"])
        rounded = case["family"] in IN_BFLOAT16
        stock = serve(Path(folder), None, case["media"], rounded)
        identity: dict[str, Any] = {"ratio": 1.0, "threshold": 128, "recent_tokens": 16}
        if rounded:  # all of them are read at once
            identity |= {"threshold": 640, "query_pool_share": 1.0}
        ours = serve(Path(folder), identity, case["media"], rounded)
    print(json.dumps({"stock": stock, "ours": ours}))


if __name__ == "__main__":
    main()
