"""The arithmetic behind MFU, by hand for a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from trainer.models.tiny import build_tiny
from trainer.training.flops import FlopCounter, count_flops, peak_flops, peak_of


def test_tokens_labels_and_patches_count_apart() -> None:
    count = FlopCounter(per_token=6000, per_label=600, per_patch=60, patches_per_image=4)
    assert count(num_tokens=7, num_supervised=3, num_images=2) == 6000 * 7 + 600 * 3 + 60 * 8


def test_a_lookup_is_no_arithmetic_and_the_head_counts_at_labels(tiny_causal: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    total = sum(parameter.numel() for parameter in model.parameters())
    lookup, head = model.get_input_embeddings().weight.numel(), model.get_output_embeddings().weight.numel()
    count = count_flops(model, model.config)
    assert (count.per_token, count.per_label) == (6 * (total - lookup - head), 6 * head)
    assert (count.per_patch, count.patches_per_image) == (0, 0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    frozen = count_flops(model, model.config)
    assert (frozen.per_token, frozen.per_label) == (4 * (total - lookup - head), 6 * head)


def test_a_head_that_is_the_lookup_counts_once_as_the_head(tiny_causal: Path) -> None:
    from transformers import AutoConfig

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_causal, tie_word_embeddings=True))
    total, lookup = (
        sum(parameter.numel() for parameter in model.parameters()),
        model.get_input_embeddings().weight.numel(),
    )
    count = count_flops(model, model.config)
    assert (count.per_token, count.per_label) == (6 * (total - lookup), 6 * lookup)


def test_the_vision_tower_counts_by_patches(tiny_llava: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    tower = [parameter for name, parameter in model.named_parameters() if "vision_tower" in name]
    size = sum(parameter.numel() for parameter in tower)
    count = count_flops(model, model.config)
    assert (count.per_patch, count.patches_per_image) == (6 * size, 16)
    for parameter in tower:
        parameter.requires_grad_(False)
    assert count_flops(model, model.config).per_patch == 2 * size, "no gradient goes through it"


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090 D", 147e12),
    ],
)
def test_devices_are_known_by_whole_words(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_patches_of_an_openvla_count(tiny_openvla: Path) -> None:
    """Its config.json has no vision_config, and says the number of patches itself."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_openvla)
    counter = count_flops(model, model.config)
    assert counter.patches_per_image == 16
    vision = sum(parameter.numel() for parameter in model.vision_backbone.parameters())
    assert counter.per_patch == 6 * vision
    assert counter(0, 0, 3) == 6.0 * vision * 48


@pytest.mark.long
@pytest.mark.parametrize(("family", "size"), [("qwen2_5_vl", (96, 64)), ("internvl", None)])
def test_patches_of_models_whose_config_has_no_plain_size_count(
    family: str, size: tuple[int, int] | None, tmp_path: Path
) -> None:
    """Qwen-VL takes images of any size, and InternVL's config has lists: [64, 64]. A patch is 8 x 8 pixels here."""
    build_tiny(family, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert count_flops(model, model.config, size).patches_per_image == (96 // 8 * 8 if size else 64)
