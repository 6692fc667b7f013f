"""The model as transformers sees it: registered, loaded, saved, generating; and how our rows say where images are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from stoker_proto.images.openvla import IMAGE_TOKEN_ID
from trainer.models.families import family_of, read_model_config
from trainer.models.openvla.configuration import OpenVLAConfig

PATCHES = 16


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def inputs(rows: int, *, tokens: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64[rows, tokens] and pixels float[rows, 6, 64, 64]."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 1000, (rows, tokens), generator=generator)
    ids[:, 0] = 1
    return ids, torch.randn(rows, 6, 64, 64, generator=generator)


@pytest.fixture(scope="module")
def loud(tiny_openvla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny one with an output layer that is not almost flat, in three shards, and a config.json as published."""
    folder = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(tiny_openvla, folder)
    (folder / "model.safetensors").unlink()
    weights, index = load_file(tiny_openvla / "model.safetensors"), {}
    weights["language_model.lm_head.weight"] *= 40
    for number in range(3):
        name = f"model-{number + 1:05}-of-00003.safetensors"
        part = {key: weights[key] for key in sorted(weights)[number::3]}
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    size = sum(tensor.nbytes for tensor in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    config = json.loads((folder / "config.json").read_text())
    text = (
        "vocab_size",
        "pad_token_id",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    config |= {
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "text_config": {"model_type": "llama", "torch_dtype": "bfloat16"} | {n: config["text_config"][n] for n in text},
        "norm_stats": {"bridge_orig": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}},
    }
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.process
@pytest.mark.parametrize("order", ["stoker first", pytest.param("transformers first", marks=pytest.mark.slow)])
def test_importing_our_package_is_all_it_takes(order: str, loud: Path) -> None:
    """The published folder names remote code (auto_map); ours is taken, without a question and without that code."""
    ours, theirs = "import trainer.models", "from transformers import AutoConfig, AutoModelForImageTextToText"
    lines = [ours, theirs] if order == "stoker first" else [theirs, ours]
    code = "\n".join(
        [
            "import sys",
            *lines[:1],
            f"print('torch' in sys.modules and {order == 'stoker first'})",
            *lines[1:],
            f"model = AutoModelForImageTextToText.from_pretrained({str(loud)!r})",
            f"print(type(model).__module__, AutoConfig.from_pretrained({str(loud)!r}).num_patches, model.dtype)",
            "import transformers; print(type(transformers.__loader__).__module__, transformers.__spec__.loader)",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    found = run.stdout.splitlines()
    assert found[0] == "False", "our package alone imports nothing heavy"
    assert found[1] == "trainer.models.openvla.modeling 16 torch.bfloat16"
    assert "registration" not in found[2], "no trace of ours is left in their module"


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_what_was_loaded(dtype: torch.dtype, loud: Path, tmp_path: Path) -> None:
    """All names and bits, those of the tensors that are never used too."""
    model = load(loud, dtype=dtype)
    model.save_pretrained(tmp_path)
    before: dict[str, torch.Tensor] = {}
    for part in sorted(loud.glob("*.safetensors")):
        before |= load_file(part)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, before[name].to(dtype)), name
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.freeze_unused()
    unused = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    backbone = "vision_backbone."
    assert {name.removeprefix(backbone).rpartition(".")[0] for name in unused} >= {
        "featurizer.blocks.2.ls2",
        "featurizer.norm",
        "fused_featurizer.blocks.2.attn.qkv",
        "fused_featurizer.attn_pool.kv",
    }
    assert len(unused) == 43
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["norm_stats"]["bridge_orig"]["action"]["q99"] == [1.0] * 7
    assert saved["text_config"]["rms_norm_eps"] == 1e-6


def test_unused_are_exactly_those_without_a_gradient(loud: Path) -> None:
    model = load(loud, dtype=torch.float32)
    ids, pixels = inputs(2)
    model(input_ids=ids, pixel_values=pixels).logits.square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    model.freeze_unused()
    assert without == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_places_and_pixel_values_mean_the_same(loud: Path) -> None:
    """Our rows hold a place for each patch; padding, which is token 1024 here, changes nothing."""
    model = load(loud, dtype=torch.float32)
    ids, pixels = inputs(2)
    mask = torch.ones_like(ids)
    mask[1, 8:], ids[1, 8:] = 0, 1024
    places = torch.full((2, PATCHES), IMAGE_TOKEN_ID)
    rows = torch.cat([ids[:, :1], places, ids[:, 1:]], dim=1)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        longer = torch.cat([mask[:, :1], torch.ones_like(places), mask[:, 1:]], dim=1)
        ours = model(input_ids=rows, attention_mask=longer, placed_pixel_values=pixels).logits
        kept = model(
            input_ids=rows, attention_mask=longer, placed_pixel_values=pixels, logits_to_keep=torch.tensor([18, 20])
        ).logits
        alone = model(input_ids=ids[1:, :8], pixel_values=pixels[1:]).logits
    assert torch.equal(ours, theirs)
    assert torch.equal(kept, theirs[:, [18, 20]])
    torch.testing.assert_close(theirs[1, : PATCHES + 8], alone[0], rtol=0, atol=1e-4)


def test_an_image_without_a_row_is_refused(loud: Path) -> None:
    model = load(loud, dtype=torch.float32)
    ids, pixels = inputs(2)
    with pytest.raises(ValueError, match="pixel_values of 1 images for 2 rows: one image per row"):
        model(input_ids=ids, pixel_values=pixels[:1])


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 2])
def test_generation_with_a_cache_is_generation_without(rows: int, loud: Path) -> None:
    model = load(loud, dtype=torch.float32)
    runs: list[int] = []
    model.vision_backbone.register_forward_hook(lambda *_: runs.append(1))
    ids, pixels = inputs(rows)
    options: dict[str, Any] = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    cached = model.generate(ids, pixel_values=pixels, **options)
    assert len(runs) == 1, "the image goes into the first forward, and only into that"
    uncached = model.generate(input_ids=ids, pixel_values=pixels, use_cache=False, **options)
    assert len(runs) == 8
    assert cached.tolist() == uncached.tolist()
    by_hand = ids
    for _ in range(7):
        logits = model(input_ids=by_hand, pixel_values=pixels).logits[:, -1]
        logits[:, 2] = -torch.inf  # no end before seven tokens
        by_hand = torch.cat([by_hand, logits.argmax(dim=-1)[:, None]], dim=1)
    assert cached.tolist() == by_hand.tolist()
    found = model.generate(ids, pixel_values=pixels, return_dict_in_generate=True, **options)
    assert found.sequences.tolist() == cached.tolist()
    other = model.generate(ids, pixel_values=pixels.flip(1), **options)
    assert other.tolist() != cached.tolist(), "another image, other tokens"


def test_logits_change_with_the_image_and_with_its_places(loud: Path) -> None:
    model = load(loud, dtype=torch.float32)
    ids, pixels = inputs(1)
    with torch.no_grad():
        first = model(input_ids=ids, pixel_values=pixels).logits[0, -1]
        for channels in (slice(0, 3), slice(3, 6)):  # DINOv2's image and SigLIP's
            changed = pixels.clone()
            changed[:, channels, :16, :16] += 1
            other = model(input_ids=ids, pixel_values=changed).logits[0, -1]
            assert (other - first).abs().max() > 1e-3
        text = model(input_ids=ids).logits
    assert text.shape[1] == 11
    assert (text[0, -1] - first).abs().max() > 1e-3


def test_an_action_is_never_made_of_other_tokens(loud: Path) -> None:
    """The published code reads them as about +1. With weights at random nearly no largest logit is an action's."""
    model = load(loud, dtype=torch.float32)
    ids, pixels = inputs(1)
    ids[0, -1] = 29871 % 1024
    with pytest.raises(ValueError, match=r"unnorm_key is 'toto': norm_stats of config\.json has bridge_orig"):
        model.predict_action(ids, "toto", pixel_values=pixels)
    with pytest.raises(ValueError, match="2 rows"):
        model.predict_action(ids.repeat(2, 1), pixel_values=pixels)
    model.resize_token_embeddings(29872 + 64, mean_resizing=False)  # as large as to hold the blank's id, 29871
    action = model.predict_action(ids, pixel_values=pixels)
    assert action.shape == (7,)
    assert ((action >= 0) & (action <= 1)).all()
    assert model.num_violations > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_towers": None}, "names 'vit_tiny_patch16_reg4_dinov2': known are vit_large_patch14_reg4_dinov2"),
        ({"use_fused_vision_backbone": False}, "only the form with two, DINOv2 and SigLIP, is supported"),
        ({"image_sizes": [64, 128]}, "both towers must see images of one size"),
    ],
)
def test_configs_that_are_not_known(changes: dict[str, Any], message: str, tiny_openvla: Path) -> None:
    values = json.loads((tiny_openvla / "config.json").read_text()) | changes
    values.pop("model_type")
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig(**values)


def test_the_family_is_known(tiny_openvla: Path) -> None:
    family = family_of(read_model_config(str(tiny_openvla)))
    assert family.sees_images
    assert family.layout is not None
    assert list(family.layout(torch.zeros(1, 6, 8, 8))) == ["placed_pixel_values"]
