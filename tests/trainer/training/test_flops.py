"""The arithmetic behind MFU, by hand for a small model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from trainer.training.flops import FlopCounter, count_flops, peak_flops


def test_six_flops_per_parameter_and_token() -> None:
    count = FlopCounter(language_parameters=1000, vision_parameters=10, patches_per_image=4)
    assert count(num_tokens=7, num_images=2) == 6 * (1000 * 7 + 10 * 4 * 2)


def test_a_lookup_is_no_arithmetic(tiny_causal: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    total = sum(parameter.numel() for parameter in model.parameters())
    count = count_flops(model, model.config)
    assert count.language_parameters == total - model.get_input_embeddings().weight.numel()
    assert (count.vision_parameters, count.patches_per_image) == (0, 0)


def test_the_vision_tower_counts_by_patches(tiny_llava: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    count = count_flops(model, model.config)
    tower = sum(parameter.numel() for name, parameter in model.named_parameters() if "vision_tower" in name)
    assert (count.vision_parameters, count.patches_per_image) == (tower, 16)


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_patches_of_an_openvla_count(tiny_openvla: Path) -> None:
    """Its config.json has no vision_config, and says the number of patches itself."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_openvla)
    counter = count_flops(model, model.config)
    assert counter.patches_per_image == 16
    vision = sum(parameter.numel() for parameter in model.vision_backbone.parameters())
    assert counter.vision_parameters == vision
    assert counter(0, 3) == 6.0 * vision * 48
