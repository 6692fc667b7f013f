"""Small random models of more families of VLMs: SmolVLM, PaliGemma, InternVL, Qwen2.5-VL, Qwen3-VL.

Their own processors need torchvision, so the files that describe one are written as the published ones are, value by value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

IMAGE = "<image>"
MERGE = 2
"""Idefics3, InternVL and Qwen-VL merge 2 x 2 patches into one token."""
_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_QWEN_TEXT = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


@dataclass(frozen=True)
class Files:
    """What the folder holds beside the model."""

    tokenizer: Any
    image: dict[str, Any]
    """Of preprocessor_config.json."""

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer's files and preprocessor_config.json."""
        self.tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(self.image, indent=2) + "\n", encoding="utf-8")


def build_vlm(family: str, tokenizer: Any, text: Any, image_size: int, tokens_per_side: int) -> tuple[Any, Files]:
    """A model with random weights, and its other files. text: a LlamaConfig for the families that take one."""
    builders: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
        "smolvlm": _smolvlm, "paligemma": _paligemma, "internvl": _internvl, "qwen2_5_vl": _qwen2_5, "qwen3_vl": _qwen3,
    }  # fmt: skip
    model, image = builders[family](tokenizer, text, image_size, tokens_per_side)
    return model, Files(tokenizer, image)


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def _ids(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_id": _id(tokenizer, getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token")}


def _smolvlm(tokenizer: Any, text: Any, size: int, side: int) -> tuple[Any, dict[str, Any]]:
    vision = {**_TOWER, "image_size": size, "patch_size": size // (side * MERGE)}
    config = transformers.SmolVLMConfig(
        vision_config=vision, text_config=text, image_token_id=_id(tokenizer, IMAGE), scale_factor=MERGE
    )
    edge = {"longest_edge": size}
    image = {"image_processor_type": "SmolVLMImageProcessor", "size": edge, "max_image_size": edge, "resample": 1}
    return transformers.SmolVLMForConditionalGeneration(config), image


def _paligemma(tokenizer: Any, text: Any, size: int, side: int) -> tuple[Any, dict[str, Any]]:
    vision = transformers.SiglipVisionConfig(
        **_TOWER, image_size=size, patch_size=size // side, vision_use_head=False, projection_dim=64
    )
    language = transformers.GemmaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, **_ids(tokenizer),
    )  # fmt: skip
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=language, image_token_index=_id(tokenizer, IMAGE), projection_dim=64,
        hidden_size=64, **_ids(tokenizer),
    )  # fmt: skip
    image = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": size, "width": size},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_seq_length": side * side,
    }
    return transformers.PaliGemmaForConditionalGeneration(config), image


def _internvl(tokenizer: Any, text: Any, size: int, side: int) -> tuple[Any, dict[str, Any]]:
    vision = transformers.InternVLVisionConfig(**_TOWER, image_size=size, patch_size=size // (side * MERGE))
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=_id(tokenizer, IMAGE), image_seq_length=side * side
    )
    image = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": size, "width": size},
        "crop_to_patches": False,
    }
    return transformers.InternVLForConditionalGeneration(config), image


def _qwen2_5(tokenizer: Any, text: Any, size: int, side: int) -> tuple[Any, dict[str, Any]]:
    patch = size // (side * MERGE)
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
        "patch_size": patch, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "window_size": patch * MERGE * 2,
        "fullatt_block_indexes": [1], "tokens_per_second": 2,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    language = {**_QWEN_TEXT, "vocab_size": -(-len(tokenizer) // 64) * 64, "rope_parameters": rope, **_ids(tokenizer)}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=language, **_qwen_ids(tokenizer))
    return transformers.Qwen2_5_VLForConditionalGeneration(config), _qwen_image(patch)


def _qwen3(tokenizer: Any, text: Any, size: int, side: int) -> tuple[Any, dict[str, Any]]:
    patch = size // (side * MERGE)
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
        "patch_size": patch, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    language = {
        **_QWEN_TEXT, "head_dim": 16, "vocab_size": -(-len(tokenizer) // 64) * 64, "rope_parameters": rope, **_ids(tokenizer),
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=language, **_qwen_ids(tokenizer))
    return transformers.Qwen3VLForConditionalGeneration(config), {
        **_qwen_image(patch),
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    start, end = (_id(tokenizer, f"<|vision_{name}|>") for name in ("start", "end"))
    return {"image_token_id": _id(tokenizer, IMAGE), "vision_start_token_id": start, "vision_end_token_id": end}


def _qwen_image(patch: int) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 4096 * 28},
    }
