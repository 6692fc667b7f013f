"""A model's image processor, read from JSON, and the same pixels as that processor makes."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stoker_proto.config import AugmentConfig, ImageConfig
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.images.families import read_image_spec
from stoker_proto.images.geometry import operations_for
from stoker_proto.images.resize import best_resize, pillow_resize, rust_resize
from stoker_proto.images.spec import ImageSpec
from stoker_proto.images.transport import ImageCoder
from stoker_proto.model_folder import ModelFolder
from tests.tiny_models import write_model_folder


def read(folder: Path) -> ImageSpec:
    model = ModelFolder(folder)
    spec = read_image_spec(model, Tokenizer.from_file(str(model.tokenizer_file)))
    assert spec is not None
    return spec


def frames() -> dict[str, NDArray[np.uint8]]:
    """Frames of several shapes; one of noise, where resampling differs most, and one of hard edges."""
    random = np.random.default_rng(7)
    rows, columns = np.mgrid[:480, :640]
    waves = np.stack([np.sin(columns / 17 + c) + np.cos(rows / 11 * (c + 1)) for c in range(3)], axis=-1) * 60 + 128
    edges = (random.integers(0, 2, (12, 16, 1)) * 255).repeat(8, 0).repeat(8, 1).repeat(3, 2)
    return {
        "landscape": waves.astype(np.uint8),
        "portrait": np.ascontiguousarray(waves.transpose(1, 0, 2)[:611, :333]).astype(
            np.uint8
        ),  # no hard edges, see resize.py
        "noise": random.integers(0, 256, (128, 128, 3), dtype=np.uint8),
        "odd": random.integers(0, 256, (97, 131, 3), dtype=np.uint8),
        "edges": edges.astype(np.uint8),
        "fits": random.integers(0, 256, (64, 64, 3), dtype=np.uint8),
    }


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("llava", "clip.image_processing_pil_clip.CLIPImageProcessorPil", {}),
    "clip_bilinear": ("llava", "clip.image_processing_pil_clip.CLIPImageProcessorPil", {"resample": 2}),
    "clip_larger": ("llava", "clip.image_processing_pil_clip.CLIPImageProcessorPil", {"size": {"shortest_edge": 80}}),
    "siglip": (
        "llava",
        "siglip.image_processing_pil_siglip.SiglipImageProcessorPil",
        {"size": {"height": 64, "width": 64}, "crop_size": None, "image_processor_type": "SiglipImageProcessor"},
    ),
    "llava_padded": (
        "llava",
        "llava.image_processing_pil_llava.LlavaImageProcessorPil",
        {"do_pad": True, "image_processor_type": "LlavaImageProcessorFast"},
    ),
    "idefics3": ("idefics3", "idefics3.image_processing_pil_idefics3.Idefics3ImageProcessorPil", {}),
    "smolvlm_up_and_down": (
        "idefics3",
        "smolvlm.image_processing_pil_smolvlm.SmolVLMImageProcessorPil",
        {"size": {"longest_edge": 256}, "image_processor_type": "SmolVLMImageProcessor"},
    ),
    "paligemma": ("paligemma", "siglip.image_processing_pil_siglip.SiglipImageProcessorPil", {}),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_pixels_equal_the_models_own_processor(case: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    family, class_path, overrides = CASES[case]
    module, _, name = class_path.rpartition(".")
    folder = write_model_folder(tmp_path, family, image_processor=overrides)
    spec = read(folder)
    _, options = ModelFolder(folder).processor_configs()
    options = {key: value for key, value in options.items() if key != "image_processor_type"}
    theirs = getattr(importlib.import_module(f"transformers.models.{module}"), name)(**options)
    extra = {"do_image_splitting": False} if family == "idefics3" else {}
    coder = ImageCoder(spec, ImageConfig(), AugmentConfig())
    for kind, frame in frames().items():
        expected = theirs(frame, do_rescale=False, do_normalize=False, **extra)["pixel_values"]
        expected = np.asarray(expected[0][0] if family == "idefics3" else expected[0]).transpose(1, 2, 0)
        difference = np.abs(coder.pixels(frame, None).astype(int) - expected.astype(int))
        assert difference.max() <= 2, (kind, difference.max())
        assert difference.mean() < 0.1, (kind, difference.mean())
        normal = np.asarray(theirs(frame, **extra)["pixel_values"])[0].reshape(3, 64, 64).transpose(1, 2, 0)
        ours = (expected * spec.rescale - np.array(spec.mean)) / np.array(spec.std)
        np.testing.assert_allclose(ours, normal, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(64, 64), (64, 131), (224, 224), (97, 50)])
def test_rust_and_pillow_agree(resample: Any, size: tuple[int, int]) -> None:
    pytest.importorskip("cykooz_resizer")
    rust, pillow = rust_resize(), pillow_resize()
    for kind, frame in frames().items():
        theirs = pillow(frame, *size, resample).astype(int)
        difference = np.abs(rust(frame, *size, resample).astype(int) - theirs)
        assert difference.max() <= 2, kind
        assert difference.mean() < 0.1, kind
    frame = frames()["landscape"]
    view = frame[3:300:2, ::-1]  # not contiguous
    assert np.array_equal(rust(view, *size, resample), rust(np.ascontiguousarray(view), *size, resample))


def test_the_order_of_the_passes_is_fixed() -> None:
    """Width first, whatever the version of Pillow prefers for a frame whose height shrinks more than its width."""
    frame, pillow = frames()["noise"], pillow_resize()
    by_hand = pillow(pillow(frame, 128, 120, "lanczos"), 64, 120, "lanczos")
    assert np.array_equal(pillow(frame, 64, 120, "lanczos"), by_hand)
    other = pillow(pillow(frame, 64, 128, "lanczos"), 64, 120, "lanczos")
    assert np.abs(by_hand.astype(int) - other).max() > 5


def test_pillow_is_used_where_the_rust_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_resize()[1].startswith("cykooz-resizer ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    resize, name = best_resize()
    assert name.startswith("pillow ")
    assert resize(frames()["noise"], 32, 48, "bicubic").shape == (32, 48, 3)


def test_spec_of_each_family(tmp_path: Path) -> None:
    llava = read(write_model_folder(tmp_path / "llava"))
    assert (llava.family, llava.height, llava.width, llava.num_tokens, llava.resample) == (
        "llava",
        64,
        64,
        16,
        "bicubic",
    )
    assert (llava.token, llava.token_id, llava.before, llava.after) == ("<image>", 1024, "", "")
    assert llava.mean == (0.48145466, 0.4578275, 0.40821073)
    assert llava.steps == (("shortest", 64, 0), ("crop", 64, 64))
    idefics = read(write_model_folder(tmp_path / "idefics3", "idefics3"))
    assert idefics.steps == (("longest", 64, 0), ("fixed", 64, 64))
    assert (idefics.before, idefics.after) == ("<fake_token_around_image><global-img>", "<fake_token_around_image>")
    assert (idefics.num_tokens, idefics.resample, idefics.mean) == (16, "lanczos", (0.5, 0.5, 0.5))
    paligemma = read(write_model_folder(tmp_path / "paligemma", "paligemma"))
    assert (paligemma.before_bos, paligemma.num_tokens, paligemma.steps) == (True, 16, (("fixed", 64, 64),))


def test_tokens_follow_the_tower_where_the_processor_does_not_say(tmp_path: Path) -> None:
    silent = {"patch_size": None, "num_additional_image_tokens": None, "vision_feature_select_strategy": None}
    folder = write_model_folder(tmp_path, processor=silent)
    assert read(folder).num_tokens == 16  # 4 x 4 patches and a class token, which "default" drops
    siglip = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 16}
    changes = {"vision_config": siglip, "vision_feature_select_strategy": "full"}
    assert read(write_model_folder(tmp_path, processor=silent, config=changes)).num_tokens == 16
    idefics = write_model_folder(tmp_path / "i", "idefics3", processor={"image_seq_len": None})
    assert read(idefics).num_tokens == 16  # 8 x 8 patches, merged 2 x 2


def test_an_older_folder_keeps_the_image_processor_in_its_own_file(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    spec = read(folder)
    parts, image = ModelFolder(folder).processor_configs()
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "processor_config.json").write_text(
        json.dumps({name: value for name, value in parts.items() if name != "image_processor"})
    )
    assert read(folder) == spec


def test_a_text_model_has_no_images(tmp_path: Path) -> None:
    model = ModelFolder(write_model_folder(tmp_path, "causal"))
    assert read_image_spec(model, Tokenizer.from_file(str(model.tokenizer_file))) is None


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"config": {"model_type": "qwen9_vl"}},
        r"'qwen9_vl' that sees images: known are llava, idefics3, smolvlm, paligemma, internvl, qwen2_5_vl, qwen3_vl, openvla, "
        r"stoker_robot;",
    ),
    ({"config": {"image_token_index": None}}, r"gives None as the image token's id"),
    ({"config": {"image_token_index": 99999}}, r"gives 99999 as the image token's id"),
    (
        {"image_processor": {"image_processor_type": "ViTImageProcessor"}},
        r"'ViTImageProcessor' is not known; known are CLIP",
    ),
    (
        {"image_processor": {"image_processor_type": "Idefics3ImageProcessor"}},
        r"Idefics3ImageProcessor in a LLaVA model",
    ),
    ({"image_processor": {"resample": 0}}, r"resample 0 is not known; known are 1 \(lanczos\)"),
    ({"image_processor": {"size": {"longest_edge": 3}}}, r"size \{'longest_edge': 3\} is not known"),
    ({"image_processor": {"do_center_crop": False}}, r"images would differ in shape; set do_center_crop"),
    ({"image_processor": {"crop_size": {"height": 99, "width": 99}}}, r"crop_size 99 x 99 is larger than size"),
    (
        {"image_processor": {"size": 32, "crop_size": 32}},
        r"makes images of 32 x 32, its vision tower takes 64 x 64; make",
    ),
    ({"image_processor": {"do_pad": True}}, r"do_pad with CLIPImageProcessor is not known"),
    ({"processor": {"patch_size": None}, "config": {"vision_config": {}}}, r"patch_size is given neither by"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_what_is_not_known_is_refused_with_the_way_out(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        read(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.base_model_path is '.*nowhere': no such folder"):
        ModelFolder(tmp_path / "nowhere")
    folder = write_model_folder(tmp_path / "model")
    (folder / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"neither processor_config.json nor preprocessor_config.json"):
        read(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer.json is missing; write it with"):
        ModelFolder(folder).tokenizer_file.exists()
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: not JSON"):
        ModelFolder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        ModelFolder(folder)


def test_spec_round_trip(tmp_path: Path) -> None:
    for family in ("llava", "idefics3", "paligemma"):
        spec = read(write_model_folder(tmp_path / family, family))
        assert ImageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    tree = spec.to_json()
    with pytest.raises(DataError, match=r"image.height is 1000000000"):
        ImageSpec.from_json({**tree, "height": 10**9})
    with pytest.raises(DataError, match=r"unknown values: colour"):
        ImageSpec.from_json({**tree, "colour": 1})


@pytest.mark.parametrize(
    ("steps", "size", "operations"),
    [
        (
            [("shortest", 224, 0), ("crop", 224, 224)],
            (480, 640),
            [("resize", 0, 0, 224, 298), ("crop", 0, 37, 224, 224)],
        ),
        ([("shortest", 224, 0), ("crop", 224, 224)], (224, 224), []),
        ([("longest", 64, 0), ("fixed", 64, 64)], (96, 128), [("resize", 0, 0, 48, 64), ("resize", 0, 0, 64, 64)]),
        ([("longest", 101, 0)], (101, 80), []),
        ([("longest", 100, 0)], (101, 80), [("resize", 0, 0, 100, 80)]),  # 79.2 rounded down, then up to even
        ([("square", 0, 0), ("fixed", 8, 8)], (4, 8), [("pad", 2, 0, 8, 8)]),
    ],
)
def test_plan(steps: Any, size: tuple[int, int], operations: list[Any]) -> None:
    assert list(operations_for(steps, *size)) == operations
