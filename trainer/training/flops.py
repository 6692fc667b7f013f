"""Model FLOPs utilisation (MFU): the model's own arithmetic as a share of the device's peak.

Counted as usual (PaLM, appendix B; Chinchilla), per parameter and token: 2 FLOPs for forward, 2 for the gradient of the
activations, 2 for that of the weights. The language model counts over its tokens, its head over those with a label (only there
are logits made), the vision tower over its patches. Frozen weights have no gradient of their own; a tower that is wholly frozen
runs forward only. Neither recomputation by gradient checkpointing nor attention over the sequence (small at these lengths) is
counted, so the figure is slightly too low.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from trainer.models.loading import true_shape

PEAK_BF16_FLOPS: dict[str, float] = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090 D": 147e12,
    "RTX 4090": 165e12,
    "B200": 2250e12,
}
"""Words of the device's name -> dense bf16 FLOP/s from the vendor's data sheet. The first match of whole words counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCounter:
    """Counts the FLOPs of training on tokens and images; all of its figures are forward and backward."""

    per_token: float
    """The language model without its head."""
    per_label: float
    """The head."""
    per_patch: float
    """The vision tower."""
    patches_per_image: int

    def __call__(self, num_tokens: int, num_supervised: int, num_images: int) -> float:
        """Of a step."""
        patches = num_images * self.patches_per_image
        return self.per_token * num_tokens + self.per_label * num_supervised + self.per_patch * patches


def count_flops(
    model: torch.nn.Module, model_config: PretrainedConfig, image_size: tuple[int, int] | None = None
) -> FlopCounter:
    """A counter from the model's parameters: all but the input embedding (a lookup), vision towers and head counted apart.

    image_size: height and width in pixels, for a model that takes images of any size; None: that of the model's config.
    """
    lookup = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    counted = {"vision": 0.0, "language": 0.0, "head": 0.0}
    sees = [parameter.requires_grad for name, parameter in model.named_parameters() if _is_vision(name)]
    for name, parameter in model.named_parameters():
        size = true_shape(parameter).numel()
        if parameter is head:
            counted["head"] += size * (6 if parameter.requires_grad else 4)
        elif _is_vision(name):
            counted["vision"] += size * ((6 if parameter.requires_grad else 4) if any(sees) else 2)
        elif parameter is not lookup:
            counted["language"] += size * (6 if parameter.requires_grad else 4)
    return FlopCounter(
        per_token=counted["language"],
        per_label=counted["head"],
        per_patch=counted["vision"],
        patches_per_image=_patches(model_config, image_size),
    )


def _is_vision(name: str) -> bool:
    return "vision" in name or "visual" in name


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one device at bf16; None if unknown."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """The same by the device's name, e.g. "NVIDIA L40S"; None if unknown.

    >>> peak_of("NVIDIA L40"), peak_of("NVIDIA A10G")
    (181000000000000.0, None)
    """
    return next((peak for words, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def _patches(model_config: PretrainedConfig, image_size: tuple[int, int] | None) -> int:
    """Of one image; 0 for a model without a vision tower."""
    if hasattr(model_config, "num_patches"):  # OpenVLA, which has no `vision_config`
        return int(model_config.num_patches)
    vision = getattr(model_config, "vision_config", None)
    height, width = image_size or _pair(getattr(vision, "image_size", 0))
    patch_height, patch_width = _pair(getattr(vision, "patch_size", 0))
    return (height // patch_height) * (width // patch_width) if patch_height and patch_width else 0


def _pair(size: Any) -> tuple[int, int]:
    """Configs have one number, or a list of two (InternVL)."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)
