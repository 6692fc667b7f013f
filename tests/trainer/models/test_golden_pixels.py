"""Pixels of frames of awkward sizes are those of transformers' own processors as users run them, with torchvision.

`make_golden_pixels.py` wrote tests/data/pixels/golden.npz in an environment with torchvision, which the tests' own lacks.
The settings are the published ones, the models are small and random.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.config import ImageConfig
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from tests.trainer.models import pixel_cases
from tests.trainer.support.memory import make_config, make_processor
from trainer.models.families import family_of, read_model_config
from trainer.models.tiny import build_tiny
from trainer.training.inputs import PixelNormaliser

GOLDEN = Path(__file__).parents[2] / "data" / "pixels" / "golden.npz"
TINY_SIZES = {"qwen2_5_vl": 112, "qwen3_vl": 128, "paligemma": 224, "internvl": 448}
"""For Qwen-VL: what gives patches of 14 and 16 pixels."""
LEVELS, MEAN_LEVELS = 1.01, 0.05
"""Largest and mean difference, of 255 levels: none was seen on x86; other instruction sets may round differently."""


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    for family, size in TINY_SIZES.items():
        build_tiny(family, folder / family, image_size=size)
        text = json.dumps(pixel_cases.SETTINGS[family])
        (folder / family / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return {family: folder / family for family in TINY_SIZES}


def our_pixels(
    model: Path, frame: Any, size: tuple[int, int] | None, tmp_path: Path
) -> tuple[Processor, dict[str, Any]]:
    """What the model's forward gets: made by the loader's code, sent as pixels, normalised by the trainer's."""
    data = {"image": ImageConfig(transport="pixels", size=size)}
    processor = make_processor(make_config(model, tmp_path, data=data))
    spec, family = processor.image, family_of(read_model_config(str(model)))
    assert spec is not None
    assert family.layout is not None
    pixels = np.empty((1, spec.height, spec.width, 3), np.uint8)
    processor.decode_image(processor.encode_image(frame, None), pixels[0])
    normalise = PixelNormaliser(spec, torch.device("cpu"), torch.float32)
    return processor, family.layout(normalise(torch.from_numpy(pixels)))


@pytest.mark.long
@pytest.mark.parametrize(("family", "height", "width"), pixel_cases.cases())
def test_pixels_are_those_of_the_fast_processors(
    family: str, height: int, width: int, models: dict[str, Path], golden: dict[str, Any], tmp_path: Path
) -> None:
    case, size = f"{family}/{height}x{width}", None
    if family.startswith("qwen"):  # its own rule chose this size for the frame
        patch = pixel_cases.SETTINGS[family]["patch_size"]
        size = tuple(int(n) * patch for n in golden[f"{case}/grid"][0, 1:])
    processor, found = our_pixels(models[family], pixel_cases.make_frame(height, width), size, tmp_path)
    pixels = found["pixel_values"].numpy()
    assert pixels.shape == tuple(golden[f"{case}/shape"])
    assert processor.image is not None
    level = 1 / 255 / min(processor.image.std)  # of normalised pixels, at most
    difference = np.abs(pixels.reshape(-1)[pixel_cases.chosen(pixels.size)] - golden[f"{case}/values"]) / level
    assert difference.max() <= LEVELS
    assert difference.mean() <= MEAN_LEVELS
    np.testing.assert_allclose(
        [pixels.mean(), pixels.std()], golden[f"{case}/moments"], rtol=0, atol=MEAN_LEVELS * level
    )
    if family.startswith("qwen"):
        assert found["image_grid_thw"].tolist() == golden[f"{case}/grid"].tolist()


def test_a_qwen_model_takes_as_many_pixels_as_its_file_says(models: dict[str, Path], tmp_path: Path) -> None:
    """Qwen2.5-VL's file names the limits min_pixels and max_pixels; 1,044,288 pixels are more than the class's default."""
    frame = pixel_cases.make_frame(40, 30)
    processor, _ = our_pixels(models["qwen2_5_vl"], frame, (1008, 1036), tmp_path)
    assert processor.image is not None
    assert processor.image.num_tokens == 36 * 37
    with pytest.raises(ConfigError, match=r"multiples of 28, and 3136 to 12845056 pixels in all"):
        our_pixels(models["qwen2_5_vl"], frame, (28, 84), tmp_path)
    other = tmp_path / "saved by transformers 4.48"
    shutil.copytree(models["qwen2_5_vl"], other)
    settings = dict(pixel_cases.SETTINGS["qwen2_5_vl"])
    limits = {name: settings.pop(name) for name in ("min_pixels", "max_pixels")}
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "size": limits}), encoding="utf-8")
    processor, _ = our_pixels(other, frame, (1008, 1036), tmp_path)
    assert processor.image is not None
    assert processor.image.num_tokens == 36 * 37
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"height": 9}}), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"has no min_pixels, and its size {'height': 9} neither min_pixels nor shortest_edge"
    ):
        our_pixels(other, frame, (1008, 1036), tmp_path)
