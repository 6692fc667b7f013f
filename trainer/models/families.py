"""Families of models: which Auto class loads one, and in which shape its forward takes images.

    no images
    batch       pixel_values [I, 3, H, W]: LLaVA, InternVL, PaliGemma
    placed      placed_pixel_values [I, 6, H, W]: OpenVLA
    one_row     pixel_values [1, I, 3, H, W], pixel_attention_mask [1, I, H, W]: Idefics3, SmolVLM
    patches     pixel_values [I * patches, 3 * 2 * P * P], image_grid_thw [I, 3]: Qwen-VL

I: images of the micro-batch in the order of its rows. Idefics3 only flattens [rows, images of a row], so all images may stand in
one row, without the all-zero images with which its own processor pads. Which model takes which is in
`stoker_proto.images.families`, the table that loaders read too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from stoker_proto.errors import ConfigError
from stoker_proto.images.families import FAMILIES

PixelLayout = Callable[[torch.Tensor], dict[str, torch.Tensor]]
TokenMarks = Callable[[torch.Tensor, torch.Tensor, int], dict[str, torch.Tensor]]


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


def as_patches(pixels: torch.Tensor, patch: int, merge: int, repeats: int) -> dict[str, torch.Tensor]:
    """pixels: float[I, 3, H, W]. Patches are in the order in which the model merges them, merge x merge at a time. Each image
    comes `repeats` times, like the frames of a still video.

    Source: transformers `models/qwen2_vl/image_processing_pil_qwen2_vl.py`, patchify.
    """
    num_images, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    cut = pixels.reshape(num_images, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # [I, rows', columns', merge, merge, 3, 1, P, P]
    cut = cut.expand(*cut.shape[:6], repeats, patch, patch)
    grid = torch.ones(
        (num_images, 3), dtype=torch.int64, device=pixels.device
    )  # filled there: nothing to copy or to wait for
    grid[:, 1], grid[:, 2] = rows, columns
    return {"pixel_values": cut.reshape(num_images * rows * columns, -1), "image_grid_thw": grid}


def mark_image_places(
    input_ids: torch.Tensor, first_learned: torch.Tensor, image_token: int
) -> dict[str, torch.Tensor]:
    """1 at the places of images, 0 at text: Qwen-VL counts positions in two dimensions there."""
    return {"mm_token_type_ids": (input_ids == image_token).to(torch.int32)}


def mark_suffix(input_ids: torch.Tensor, first_learned: torch.Tensor, image_token: int) -> dict[str, torch.Tensor]:
    """0 in the prompt, whose tokens all see each other, 1 from the first label on: PaliGemma."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return {"token_type_ids": (places >= first_learned[:, None]).to(torch.int64)}


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between the models that Stoker trains."""

    auto_class: Any
    """transformers' Auto class that loads the base model and the export."""
    layout: PixelLayout | None
    """Pixels -> keyword arguments of forward; None: the model sees no images."""
    marks: TokenMarks | None = None
    """(input_ids int64[B, T], first label of each row int64[B] (T: none), id of the image token) -> more arguments of forward."""
    causal: bool = True
    """Whether no token of a row sees what stands behind it; of text models that is only supposed (`mask_check`)."""

    @property
    def sees_images(self) -> bool:
        """Whether every micro-batch must hold an image, so that all ranks run the same modules."""
        return self.layout is not None


_LAYOUTS: dict[str, PixelLayout] = {"batch": as_batch, "one_row": as_one_row, "placed": as_placed}
_MARKS: dict[str, TokenMarks | None] = {"": None, "image_places": mark_image_places, "suffix": mark_suffix}


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
    if kind not in FAMILIES:
        if getattr(model_config, "vision_config", None) is None:
            return Family(AutoModelForCausalLM, None)
        raise ConfigError(
            f"model.base_model_path holds a model of type {kind}, which sees images: known are {', '.join(FAMILIES)}; take "
            "another model"
        )
    known = FAMILIES[kind]
    if known.layout == "patches":
        vision = model_config.vision_config
        layout: PixelLayout = partial(
            as_patches, patch=vision.patch_size, merge=vision.spatial_merge_size, repeats=vision.temporal_patch_size
        )
    else:
        layout = _LAYOUTS[known.layout]
    return Family(AutoModelForImageTextToText, layout, _MARKS[known.marks], known.causal)


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
