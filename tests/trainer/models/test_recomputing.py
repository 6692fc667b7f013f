"""Gradient checkpointing changes no gradient, whatever is frozen before the layers that are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stoker_proto.config import Config, ImageConfig, LoraConfig
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config, make_examples, make_piece, make_processor
from trainer.feed.batch import BatchBuilder
from trainer.models.families import family_of, read_model_config
from trainer.models.loading import load_model
from trainer.models.tiny import build_tiny
from trainer.training.inputs import InputMaker


def gradients(config: Config) -> dict[str, torch.Tensor]:
    """Of all trained parameters, for two rows with an image; None where there is none."""
    processor = make_processor(config)
    family = family_of(read_model_config(config.model.base_model_path))
    torch.manual_seed(0)
    model = load_model(config, family, {"zero_optimization": {"stage": 0}}, processor.vocab_size_needed).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.01)  # with zeros, as a run begins, the other matrix has no gradient
    examples = [example for example in make_examples(6, seed=1) if example.frame is not None][:2]
    piece = make_piece(examples, range(2), processor)
    batch = BatchBuilder(decoder=processor, num_rows=2, max_tokens=config.data.max_seq_len)([piece])
    inputs = InputMaker(processor, family, torch.device("cpu"), torch.float32)(batch)
    model(**inputs.arguments, use_cache=False).logits.float().log_softmax(-1)[..., 5].sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name is too new for us
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen3_vl", {"lora": LoraConfig(rank=2, targets=("qkv", "q_proj"))}),
        ("qwen3_vl", {"freeze": ("*patch_embed*", "*pos_embed*", "*visual.blocks.0.*", "*embed_tokens*")}),
        ("openvla", {"lora": LoraConfig(rank=2, targets=("qkv", "q_proj"))}),
        ("llava", {"freeze": ("*vision_tower*", "*embed_tokens*")}),
    ],
)
def test_layers_behind_frozen_ones_have_the_gradients_that_they_have_without(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    build_tiny(family, model)
    image = ImageConfig(transport="pixels", size=(64, 64) if family.startswith("qwen") else None)
    plain, recomputed = (
        gradients(make_config(model, tmp_path, data={"image": image}, gradient_checkpointing=on, **keys))
        for on in (False, True)
    )
    assert any("vis" in name for name in plain) != (family == "llava")
    assert recomputed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_model_that_cannot_is_named(tmp_path: Path) -> None:
    build_tiny("robot", tmp_path / "model")
    config = make_config(tmp_path / "model", tmp_path, gradient_checkpointing=True)
    with pytest.raises(
        ConfigError, match=r"gradient_checkpointing is true, and RobotPolicy cannot .*: set it to false"
    ):
        load_model(
            config, family_of(read_model_config(str(tmp_path / "model"))), {"zero_optimization": {"stage": 0}}, 0
        )
