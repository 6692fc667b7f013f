"""Our OpenVLA against the published code at its pinned versions: names, towers, logits, loss, tokens, actions, pixels.

tests/data/openvla was written by `make_golden.py` from a model of which every tensor is a hash of its name (`hashed.py`), so no
weights are stored. The published code is not part of this repository. To write it again (transformers 4.40.1, tokenizers 0.19.1,
timm 0.9.10, torch 2.13, Python 3.11):

    python3.11 -m venv golden/venv
    golden/venv/bin/pip install torch numpy pillow==10.4.0 safetensors pyyaml regex requests tqdm huggingface_hub==0.23.5
    golden/venv/bin/pip install --no-deps transformers==4.40.1 tokenizers==0.19.1 timm==0.9.10 torchvision==0.28.0
    # prismatic/extern/hf/{configuration,modeling,processing}_prismatic.py of github.com/openvla/openvla at c8f03f4, and an empty
    # __init__.py, into golden/upstream
    golden/venv/bin/python tests/trainer/models/openvla/make_golden.py golden/upstream tests/data/openvla

names_7b.txt is the state_dict of the published class with the two real towers on the meta device.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from stoker_proto.config import AugmentConfig, ImageConfig
from stoker_proto.errors import ConfigError
from stoker_proto.images.openvla import openvla_spec
from stoker_proto.images.spec import ImageSpec
from stoker_proto.images.transport import ImageCoder
from tests.trainer.models.openvla import hashed
from trainer.models.openvla.configuration import OpenVLAConfig
from trainer.training.inputs import PixelNormaliser

DATA = Path(__file__).parents[3] / "data" / "openvla"
MEANS, STDS = [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]], [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return dict(np.load(DATA / "golden.npz"))


@pytest.fixture(scope="module")
def model() -> Any:
    """Built by the Auto classes from the config.json that the published code wrote (and the towers' shapes)."""
    found = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(DATA)).eval()
    hashes = {name: torch.from_numpy(hashed.weight(name, tuple(t.shape))) for name, t in found.state_dict().items()}
    found.load_state_dict(hashes)
    return found


def assert_close(found: torch.Tensor, expected: Any, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=atol)


def test_names_and_shapes_are_the_published_ones(model: Any) -> None:
    expected = json.loads((DATA / "names.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_towers_logits_and_loss(model: Any, golden: dict[str, Any]) -> None:
    """In float64, so that the result is the same on every CPU. The golden values are float32: their logits are off by 2.3e-5."""
    model, pixels = copy.deepcopy(model).double(), torch.from_numpy(hashed.pixels()).double()
    ids, mask = (torch.from_numpy(array) for array in hashed.token_rows())
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :5] = -100
    dino, siglip = pixels.split([3, 3], dim=1)
    with torch.no_grad():
        assert_close(model.vision_backbone.featurizer(dino), golden["dino"])
        assert_close(model.vision_backbone.fused_featurizer(siglip), golden["siglip"])
        assert_close(model.image_features(pixels), golden["projected"])
        output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
    assert output.logits.shape == (2, 16 + 14, 32064)
    real = np.concatenate([np.ones((2, 16), bool), mask.numpy() == 1], axis=1)  # padding's own logits mean nothing
    assert_close(
        output.logits[..., torch.from_numpy(hashed.logit_columns())][torch.from_numpy(real)],
        golden["logits"][real],
        atol=2.5e-5,
    )
    assert output.loss.item() == pytest.approx(float(golden["loss"]), abs=1e-5)


def test_tokens_and_action(model: Any, golden: dict[str, Any]) -> None:
    ids, pixels = torch.from_numpy(hashed.token_rows()[0])[:1], torch.from_numpy(hashed.pixels())[:1]
    tokens = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=7, do_sample=False)
    assert tokens.tolist() == golden["tokens"].tolist()
    assert len(set(tokens[0, -7:].tolist())) > 3, "not one token again and again"
    action = model.predict_action(ids, unnorm_key="golden", pixel_values=pixels)
    np.testing.assert_allclose(action, golden["action"], rtol=0, atol=1e-12)
    assert action[3] == 0.0, "q01 = q99"
    assert model.num_violations == 0


def spec(strategy: str) -> ImageSpec:
    image = {
        "image_resize_strategy": strategy,
        "input_sizes": [[3, 56, 56]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": MEANS,
        "stds": STDS,
    }
    return openvla_spec(json.loads((DATA / "config.json").read_text()), image, ConfigError)


@pytest.mark.parametrize("strategy", ["resize-naive", "letterbox", "resize-crop"])
@pytest.mark.parametrize("kind", sorted(hashed.FRAME_SHAPES))
def test_levels_are_those_of_the_published_processor(strategy: str, kind: str, golden: dict[str, Any]) -> None:
    pixels = ImageCoder(spec(strategy), ImageConfig(), AugmentConfig()).pixels(hashed.frame(kind), None)
    difference = np.abs(pixels.transpose(2, 0, 1).astype(int) - golden[f"levels/{strategy}/{kind}"])
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_one_image_is_normalised_twice(golden: dict[str, Any]) -> None:
    levels = torch.from_numpy(golden["levels/resize-naive/landscape"]).permute(1, 2, 0)[None].contiguous()
    normalise = PixelNormaliser(spec("resize-naive"), torch.device("cpu"), torch.float32)
    assert_close(normalise(levels)[0], golden["normalised"])


def names_of_7b() -> Iterator[tuple[str, tuple[int, ...]]]:
    for line in (DATA / "names_7b.txt").read_text().splitlines():
        name, *sizes = line.split()
        numbers = re.search(r"\{0\.\.(\d+)\}", name)
        for number in range(int(numbers[1]) + 1 if numbers else 1):
            yield re.sub(r"\{.*\}", str(number), name), tuple(map(int, sizes))


def test_the_shape_of_the_7b_model() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            OpenVLAConfig(text_config={"vocab_size": 32064, "pad_token_id": 32000})
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == dict(names_of_7b())
    assert len(shapes) == 982
    assert sum(map(prod, shapes.values())) == 7_541_237_184
    assert model.config.num_patches == 256
    model.freeze_unused()
    frozen = [parameter.numel() for parameter in model.parameters() if not parameter.requires_grad]
    assert (len(frozen), sum(frozen)) == (43, 43_080_480)
