"""Model FLOPs utilisation (MFU): the model's own arithmetic as a share of the device's peak.

Counted as usual (PaLM, appendix B; Chinchilla): 6 FLOPs per parameter and token for forward and backward, for the language
model over its tokens and for the vision tower over its patches. Neither recomputation by gradient checkpointing nor attention
over the sequence (small at these lengths) is counted, so the figure is slightly too low.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from trainer.models.loading import true_shape

PEAK_BF16_FLOPS: dict[str, float] = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "B200": 2250e12,
}
"""Part of the device's name -> dense bf16 FLOP/s from the vendor's data sheet. The first match counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCounter:
    """Counts the FLOPs of training on tokens and images."""

    language_parameters: int
    vision_parameters: int
    patches_per_image: int

    def __call__(self, num_tokens: int, num_images: int) -> float:
        """Forward and backward of a step."""
        return 6.0 * (
            self.language_parameters * num_tokens + self.vision_parameters * self.patches_per_image * num_images
        )


def count_flops(model: torch.nn.Module, model_config: PretrainedConfig) -> FlopCounter:
    """A counter from the model's parameters: all but the input embedding (a lookup), vision towers counted apart."""
    vision = language = 0
    lookup = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    tied = getattr(model.get_output_embeddings(), "weight", None) is lookup  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        size = true_shape(parameter).numel()
        if "vision" in name:
            vision += size
        elif parameter is not lookup or tied:
            language += size
    side = _patches_per_side(getattr(model_config, "vision_config", None))
    patches = int(getattr(model_config, "num_patches", side * side))  # OpenVLA, which has no `vision_config`, says it
    return FlopCounter(language_parameters=language, vision_parameters=vision, patches_per_image=patches)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one device at bf16; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def _patches_per_side(vision_config: PretrainedConfig | None) -> int:
    size, patch = getattr(vision_config, "image_size", 0), getattr(vision_config, "patch_size", 0)
    return int(size) // int(patch) if isinstance(size, int) and isinstance(patch, int) and patch else 0
