"""Frames are padded to a square in training exactly where the exported model's own processor pads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker_proto.errors import ConfigError
from stoker_proto.images.padding import unpadded_by
from stoker_proto.model_folder import ModelFolder
from stoker_proto.processor import Processor
from tests.tiny_models import make_config, write_model_folder

PADS = {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
SIGLIP: dict[str, Any] = {
    "image_processor": {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 64, "width": 64}, "crop_size": None,
    },
    "config": {"vision_config": {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 16}},
}  # fmt: skip
MEAN = (122, 116, 104)  # of CLIP's mean colour, as transformers' LLaVA processor rounds it


def build(folder: Path, *overrides: str) -> Processor:
    return Processor.build(make_config(folder, *overrides), None)


@pytest.mark.parametrize(
    ("changes", "overrides", "colour"),
    [
        ({"image_processor": PADS}, (), MEAN),
        ({"image_processor": PADS}, ("data.image.pad_to_square=true",), MEAN),
        ({}, ("data.image.pad_to_square=true",), MEAN),
        ({"image_processor": {"do_normalize": False}}, ("data.image.pad_to_square=true",), (0, 0, 0)),
        (SIGLIP, ("data.image.pad_to_square=true",), (127, 127, 127)),
    ],
    ids=["the model's own", "both", "added to CLIP's", "without normalisation", "added to SigLIP's"],
)
def test_the_exported_processor_pads_as_training_did(
    changes: dict[str, Any], overrides: tuple[str, ...], colour: tuple[int, int, int], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from trainer.checkpoints.export import copy_base_files, write_padding

    base, exported = write_model_folder(tmp_path / "base", **changes), tmp_path / "export"
    exported.mkdir()
    processor = build(base, *overrides)
    assert processor.image is not None
    copy_base_files(base, exported)
    write_padding(exported, processor)
    tree = json.loads((exported / "processor_config.json").read_text())["image_processor"]
    (exported / "preprocessor_config.json").write_text(json.dumps(tree))  # what AutoImageProcessor reads, too
    theirs = transformers.AutoImageProcessor.from_pretrained(exported)
    frame = np.random.default_rng(3).integers(0, 256, (60, 131, 3), dtype=np.uint8)
    expected = np.asarray(theirs(frame, do_rescale=False, do_normalize=False)["pixel_values"][0]).transpose(1, 2, 0)
    ours = processor.image_pixels(frame)
    assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 2
    assert tuple(ours[0, 0]) == colour, "the first row is padding"
    ready = np.asarray(theirs(frame)["pixel_values"][0])
    spec = processor.image
    mine = (expected * spec.rescale - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(ready.transpose(1, 2, 0), mine, atol=1e-5)
    again = build(write_padded_copy(base, tree, tmp_path / "again"))
    assert again.image == processor.image, "the export as a base model"


def write_padded_copy(base: Path, image: dict[str, Any], target: Path) -> Path:
    target.mkdir()
    for file in base.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    parts = json.loads((base / "processor_config.json").read_text())
    (target / "processor_config.json").write_text(json.dumps({**parts, "image_processor": image}))
    return target


def test_an_older_export_keeps_its_own_file(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from trainer.checkpoints.export import copy_base_files, write_padding

    base, exported = write_model_folder(tmp_path / "base"), tmp_path / "export"
    parts, image = ModelFolder(base).processor_configs()
    (base / "preprocessor_config.json").write_text(json.dumps(image))
    (base / "processor_config.json").unlink()
    exported.mkdir()
    copy_base_files(base, exported)
    write_padding(exported, build(base))
    assert json.loads((exported / "preprocessor_config.json").read_text()) == image, "nothing is padded"
    write_padding(exported, build(base, "data.image.pad_to_square=true"))
    written = json.loads((exported / "preprocessor_config.json").read_text())
    assert (written["image_processor_type"], written["do_pad"]) == ("LlavaImageProcessor", True)
    assert parts["patch_size"] == 16


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"image_processor": PADS}, ("data.image.pad_to_square=false",), r"pad_to_square is false, but the image processor"),
        ({"config": {"image_aspect_ratio": "pad"}}, (), r"config.json: image_aspect_ratio is 'pad', so the model was trained"),
        ({"config": {"image_aspect_ratio": "anyres"}}, (), r"image_aspect_ratio is 'anyres', which cuts an image into tiles"),
        ({"image_processor": {"do_pad": True}}, (), r"do_pad with CLIPImageProcessor is not known"),
        (
            {"family": "paligemma", "image_processor": {"do_pad": True, "pad_size": {"height": 80, "width": 80}}},
            (),
            r"do_pad to \{'height': 80, 'width': 80\} is not known",
        ),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused(
    changes: dict[str, Any], overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(write_model_folder(tmp_path, **changes), *overrides)


def test_a_model_that_was_trained_padded_takes_either_answer(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, config={"image_aspect_ratio": "pad"})
    padded, as_it_is = (build(folder, f"data.image.pad_to_square={answer}") for answer in ("true", "false"))
    assert padded.image is not None
    assert padded.image.steps[0] == ("square", 0, 0)
    assert as_it_is.image is not None
    assert as_it_is.image.steps[0] == ("shortest", 64, 0)


def test_a_processor_that_cannot_pad_is_named(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "p", "paligemma")
    processor = build(folder, "data.image.pad_to_square=true")
    assert processor.image is not None
    assert processor.image.pad_colour == (0, 0, 0)
    told = unpadded_by(processor.image, ModelFolder(folder))
    assert told is not None
    assert told.startswith("data.image.pad_to_square pads frames with black, which transformers'")
    assert unpadded_by(build(folder).image, ModelFolder(folder)) is None
    llava = write_model_folder(tmp_path / "l")
    assert unpadded_by(build(llava, "data.image.pad_to_square=true").image, ModelFolder(llava)) is None
