"""Adapters: where they go, what they add up to, and what a wrong setting says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from stoker_proto.config import LoraConfig
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config
from trainer.models.families import family_of, read_model_config
from trainer.models.loading import choose_trained
from trainer.models.lora import add_adapters, find_targets, merge

BLOCK = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "koqv"))


def load(folder: Path) -> transformers.PreTrainedModel:
    return family_of(read_model_config(str(folder))).auto_class.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "prefix", "layers"),
    [
        ("llava", "model.language_model.layers", 3),
        ("idefics3", "model.text_model.layers", 3),
        ("openvla", "language_model.model.layers", 2),
        ("causal", "model.layers", 3),
    ],
)
def test_auto_means_the_language_models_blocks(
    family: str, prefix: str, layers: int, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(f"tiny_{family}"))
    assert find_targets(model, ("auto",)) == [f"{prefix}.{n}.{part}" for n in range(layers) for part in BLOCK]


def test_targets_by_name_are_full_names_or_last_parts(tiny_causal: Path) -> None:
    model = load(tiny_causal)
    expected = [f"model.layers.{n}.self_attn.{x}_proj" for n in range(3) for x in "qv"]
    assert find_targets(model, ("q_proj", "v_proj")) == expected
    assert find_targets(model, ("model.layers.1.mlp.up_proj",)) == ["model.layers.1.mlp.up_proj"]
    message = "model.lora.targets names 'query'.*down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ConfigError, match=message):
        find_targets(model, ("q_proj", "query"))
    with pytest.raises(ConfigError, match=r"model.lora.targets names 'embed_tokens': the model has no linear layer of"):
        find_targets(model, ("lm_head", "embed_tokens"))


def test_an_adapter_on_a_tied_head_cannot_be_merged(tied_causal: Path) -> None:
    """A program that ties the two on loading would drop it without a word."""
    targets = ("lm_head", "q_proj")
    with pytest.raises(ConfigError, match=r"model.lora.targets names lm_head, whose weights are the input embeddings"):
        add_adapters(load(tied_causal), LoraConfig(rank=4, targets=targets), seed=0)
    model = load(tied_causal)
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        add_adapters(model, LoraConfig(rank=4, targets=targets, export="adapter"), seed=0)
    assert "lm_head.lora_A.default.weight" in dict(model.named_parameters())


@pytest.mark.long
def test_merged_weights_are_pefts_own(tiny_causal: Path) -> None:
    """And the merged model computes what the model with adapters computes."""
    import peft

    config = LoraConfig(rank=4, alpha=12.0, targets=("q_proj", "down_proj"))
    model = load(tiny_causal)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapters(model, config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (".lora_" in name)
            if ".lora_B." in name:
                assert not parameter.any(), "the first step starts from the base model"
                parameter.normal_(std=0.1, generator=generator)
    ids = torch.arange(5, 15)[None]
    expected = model(input_ids=ids).logits.detach()
    merged = merge(model.state_dict(), config)
    assert merged.keys() == plain.keys()
    changed = {name for name in plain if not torch.equal(merged[name], plain[name])}
    assert changed == {
        f"model.layers.{n}.{part}.weight" for n in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    fresh = load(tiny_causal)
    fresh.load_state_dict(merged)
    torch.testing.assert_close(fresh(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    theirs = model.state_dict()
    for n in range(3):
        name = f"model.layers.{n}.mlp.down_proj"
        torch.testing.assert_close(merged[f"{name}.weight"], theirs[f"{name}.base_layer.weight"], rtol=0, atol=1e-6)


def test_the_seed_makes_the_adapters(tiny_causal: Path) -> None:
    first, same, other = (load(tiny_causal) for _ in range(3))
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        add_adapters(model, LoraConfig(rank=2), seed)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_what_is_frozen_is_named_by_patterns(tiny_llava: Path, tmp_path: Path) -> None:
    model = load(tiny_llava)
    choose_trained(model, make_config(tiny_llava, tmp_path, freeze=("*vision_tower*", "lm_head.weight")), grown=False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if "vision_tower" in name or name == "lm_head.weight"
    }
    with pytest.raises(
        ConfigError, match=r"model.freeze names 'vision_towr\*', which matches no parameter; .* lm_head.weight, model"
    ):
        choose_trained(model, make_config(tiny_llava, tmp_path, freeze=("vision_towr*",)), grown=False)


def test_what_adapters_would_leave_untrained_is_refused(tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, lora=LoraConfig())
    with pytest.raises(ConfigError, match=r"leaves the embeddings as they are.*data.action.vocabulary=reuse_last"):
        choose_trained(load(tiny_causal), config, grown=True)
    both = make_config(tiny_causal, tmp_path, lora=LoraConfig(), freeze=("lm_head.*",))
    with pytest.raises(ConfigError, match=r"beside model.lora, which freezes all weights of the base model"):
        choose_trained(load(tiny_causal), both, grown=False)
