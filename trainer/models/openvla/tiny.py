"""A small random OpenVLA with the published files: config.json, preprocessor_config.json, a tokenizer as Llama's is laid out.

    tokenizer   <unk> <s> </s>   0-2     bytes and merges 3-1023, of which the last 256 are actions     <PAD> 1024
    embedding   1024 tokens and 64 rows more, as the published one has 32000 and 64

Two towers of three blocks, of which two run; an image is 4 x 4 patches whatever its size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from trainer.models.openvla.configuration import OpenVLAConfig, TowerShape, tower_values
from trainer.models.openvla.modeling import OpenVLAForActionPrediction

PADDED_ROWS = 64
_NAMES: dict[str, Any] = {
    "arch_specifier": "no-align+fused-gelu-mlp",
    "image_resize_strategy": "resize-naive",
    "llm_backbone_id": "llama2-7b-pure",
    "timm_override_act_layers": [None, None],
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}
"""Keys of config.json that only the published code reads."""


@dataclass(frozen=True)
class OpenVLAFiles:
    """What the folder holds beside the model."""

    tokenizer: Any
    image_size: int

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer's files and preprocessor_config.json."""
        self.tokenizer.save_pretrained(folder)
        values = {
            "image_processor_type": "PrismaticImageProcessor",
            "processor_class": "PrismaticProcessor",
            "use_fused_vision_backbone": True,
            "image_resize_strategy": "resize-naive",
            "input_sizes": [[3, self.image_size, self.image_size]] * 2,
            "interpolations": ["bicubic", "bicubic"],
            "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
            "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def build_openvla(tokenizer: Any, image_size: int, patches_per_side: int) -> tuple[Any, OpenVLAFiles]:
    """A model with random weights, and its other files."""
    patch_size = image_size // patches_per_side
    dino = TowerShape(
        width=64, depth=3, num_heads=4, mlp_width=128, patch_size=patch_size,
        num_registers=4, has_class_token=True, has_layer_scale=True,
    )  # fmt: skip
    siglip = TowerShape(width=96, depth=3, num_heads=4, mlp_width=192, patch_size=patch_size, has_attention_pool=True)
    names = ("bos_token", "eos_token", "pad_token")
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)) for name in names}
    text = LlamaConfig(
        vocab_size=ids["pad_token_id"] + PADDED_ROWS, hidden_size=64, intermediate_size=160,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048, **ids,
    )  # fmt: skip
    config = OpenVLAConfig(
        text_config=text,
        timm_model_ids=[f"vit_tiny_patch{patch_size}_reg4_dinov2", f"vit_tiny_patch{patch_size}_siglip_{image_size}"],
        vision_towers=[tower_values(dino), tower_values(siglip)],
        image_sizes=[image_size, image_size],
        pad_token_id=ids["pad_token_id"],
        pad_to_multiple_of=PADDED_ROWS,
        norm_stats={},
        **_NAMES,
    )
    return OpenVLAForActionPrediction(config), OpenVLAFiles(tokenizer, image_size)
