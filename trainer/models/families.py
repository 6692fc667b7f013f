"""Families of models: which Auto class loads one, and in which shape its forward takes images.

    text                 no images
    images               pixel_values [I, 3, H, W]: LLaVA, InternVL and most others
    placed images        placed_pixel_values [I, 6, H, W]: OpenVLA
    images with masks    pixel_values [1, I, 3, H, W], pixel_attention_mask [1, I, H, W]: Idefics3, SmolVLM

I: images of the micro-batch in the order of its rows. Idefics3 only flattens [rows, images of a row], so all images may stand in
one row, without the all-zero images with which its own processor pads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from stoker_proto.errors import ConfigError

PixelLayout = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def as_batch(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """pixels: float[I, 3, H, W]."""
    return {"pixel_values": pixels}


def as_one_row(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """pixels: float[I, 3, H, W]; every pixel is real, as frames are resized to the model's size."""
    num_images, _, height, width = pixels.shape
    mask = torch.ones((1, num_images, height, width), dtype=torch.bool, device=pixels.device)
    return {"pixel_values": pixels.unsqueeze(0), "pixel_attention_mask": mask}


def as_placed(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """pixels: float[I, 6, H, W]; their places stand in input_ids."""
    return {"placed_pixel_values": pixels}


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between the models that Stoker trains."""

    auto_class: Any
    """transformers' Auto class that loads the base model and the export."""
    layout: PixelLayout | None
    """Pixels -> keyword arguments of forward; None: the model sees no images."""

    @property
    def sees_images(self) -> bool:
        """Whether every micro-batch must hold an image, so that all ranks run the same modules."""
        return self.layout is not None


LAYOUTS: dict[str, PixelLayout] = {"idefics3": as_one_row, "smolvlm": as_one_row, "openvla": as_placed}
"""model_type -> layout; all other models take images as a batch."""

UNSUPPORTED: dict[str, str] = {
    "paligemma": "its prompt needs attention in both directions, which Stoker's masks do not express",
    "qwen2_vl": "its forward needs `image_grid_thw`",
    "qwen2_5_vl": "its forward needs `image_grid_thw`",
    "qwen3_vl": "its forward needs `image_grid_thw`",
}
"""model_type -> why Stoker cannot train it."""


def read_model_config(folder: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's own config.json. Raises ConfigError."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model.base_model_path is {folder!r}: transformers cannot read its config: {first_line}"
        ) from error


def family_of(model_config: PretrainedConfig) -> Family:
    """The family of a model. Raises ConfigError for a model that Stoker cannot train."""
    kind = model_config.model_type
    if kind in UNSUPPORTED:
        raise ConfigError(
            f"model.base_model_path holds a model of type {kind}: {UNSUPPORTED[kind]}; take another model"
        )
    if getattr(model_config, "vision_config", None) is None and kind not in LAYOUTS:
        return Family(AutoModelForCausalLM, None)
    return Family(AutoModelForImageTextToText, LAYOUTS.get(kind, as_batch))


def check_forward(model: torch.nn.Module, family: Family, *, packing: bool) -> None:
    """Check that the model's forward has the arguments that Stoker passes. Raises ConfigError."""
    names = inspect.signature(model.forward).parameters
    if family.sees_images and "pixel_values" not in names:
        raise ConfigError(f"{type(model).__name__}: its forward takes no `pixel_values`; take a model that does")
    if packing and "position_ids" not in names:
        raise ConfigError(
            f"{type(model).__name__}: its forward takes no `position_ids`, so it cannot know where the samples of a packed "
            "row begin: set data.packing to false, or take another model"
        )


def takes_positions(model: torch.nn.Module) -> bool:
    """Whether forward can return the logits of chosen positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
