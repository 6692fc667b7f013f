"""Frames encoded by torch, as on a GPU, beside the CPU's libraries. The device here is torch's CPU; on a GPU the sums are equal.

No test of this file has run on a GPU: tests/gpu holds what needs one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from loader_service.pieces import device_images as module
from loader_service.pieces.device_images import DeviceImages, image_libraries, nvjpeg
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.resample_weights import UNIT, resample_weights
from loader_service.prepare.run import prepare
from loader_service.server.command import all_fingerprints
from stoker_proto.config import AugmentConfig, ImageConfig, LoaderConfig
from stoker_proto.config.reader import load_config
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.images.spec import ImageSpec, Resample
from stoker_proto.images.transport import ImageCoder
from stoker_proto.processor import Processor
from tests.tiny_models import make_config, write_model_folder

pytest.importorskip("torch")
DEMONSTRATIONS = Path(__file__).parents[2] / "data" / "maniskill"
SPEC = ImageSpec(
    family="llava",
    height=48,
    width=48,
    steps=(("shortest", 48, 0), ("crop", 48, 48)),
    resample="bicubic",
    rescale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    num_tokens=16,
    token="<image>",
    token_id=9,
)
ON_TORCH = LoaderConfig(device="torch")
STRONG = AugmentConfig(crop_area=0.8, brightness=0.3, contrast=0.4, saturation=0.5)


def frames(count: int, height: int, width: int) -> list[NDArray[np.uint8]]:
    """Smooth pictures with hard edges and a little noise, as a camera's."""
    rng = np.random.default_rng(7)
    rows, columns = np.mgrid[:height, :width]
    found = []
    for _ in range(count):
        waves = np.stack([np.sin(rows / rng.uniform(8, 30) + columns / rng.uniform(8, 30)) for _ in range(3)], axis=-1)
        picture = 128 + 90 * waves + rng.normal(0, 3, (height, width, 3))
        picture[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
        found.append(np.clip(picture, 0, 255).astype(np.uint8))
    return found


def coder(spec: ImageSpec = SPEC, augment: AugmentConfig = STRONG, transport: Any = "pixels") -> ImageCoder:
    return ImageCoder(spec, ImageConfig(transport=transport), augment)


def levels_apart(data: bytes, other: bytes) -> NDArray[np.int16]:
    return np.abs(np.frombuffer(data, np.uint8).astype(np.int16) - np.frombuffer(other, np.uint8))


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(96, 128), (31, 77), (200, 64)])
def test_resizing_is_pillows_within_one_level(resample: Resample, size: tuple[int, int]) -> None:
    spec = dataclasses.replace(SPEC, resample=resample, steps=(("fixed", 48, 48),))
    [frame] = frames(1, *size)
    [ours] = DeviceImages(coder(spec), ON_TORCH).encode_all([frame], [None])
    method = Image.Resampling[resample.upper()]
    pillow = Image.fromarray(frame).resize((48, size[0]), method).resize((48, 48), method)
    apart = levels_apart(ours, np.asarray(pillow).tobytes())
    assert apart.max() <= 1
    assert apart.mean() < 0.02


@pytest.mark.long
def test_weights_are_whole_numbers_whose_sums_float32_holds() -> None:
    for resample in ("bilinear", "bicubic", "lanczos"):
        for size, new_size in ((640, 224), (97, 224), (4096, 31), (5, 300)):
            weights = resample_weights(resample, size, new_size)
            assert weights.shape == (new_size, size)
            assert np.array_equal(weights, np.rint(weights))
            assert np.array_equal(weights.sum(1), np.full(new_size, UNIT))
            assert np.abs(weights).sum(1).max() * 255 + UNIT // 2 < 1 << 24


@pytest.mark.parametrize(
    "steps",
    [
        (("shortest", 48, 0), ("crop", 48, 48)),
        (("square", 0, 0), ("fixed", 48, 48)),
        (("letterbox", 0, 0), ("fixed", 48, 48)),
        (("centre", 48, 48),),
    ],
)
def test_all_steps_and_changes_agree_with_the_cpu_loader(steps: Any) -> None:
    """Frames of two sizes, with and without augmentation, in one call; their order stays."""
    spec = dataclasses.replace(SPEC, steps=steps, pad_colour=(12, 130, 250))
    one = coder(spec)
    mixed: list[Any] = [*frames(3, 96, 128), *frames(2, 70, 60), *frames(1, 96, 128)]
    keys = [11, None, 12, 13, 14, None]
    depth = (np.mgrid[:96, :128][1] * 20).astype(np.uint16)
    mixed, keys = [*mixed, depth], [*keys, 11]
    ours = DeviceImages(one, ON_TORCH).encode_all(mixed, keys)
    for data, frame, key in zip(ours, mixed, keys, strict=True):
        apart = levels_apart(data, one.encode(frame, key))
        assert apart.mean() < 0.5
        assert apart.max() <= 6  # the CPU's library is up to 2 levels from Pillow; contrast and saturation widen it


def test_changes_of_colour_are_equal_to_the_bit() -> None:
    """Frames of the model's size are not resized: only the arithmetic of the augmentation is left."""
    augment = dataclasses.replace(STRONG, crop_area=1.0)
    one = coder(augment=augment)
    same = frames(5, 48, 48)
    keys: list[int | None] = [3, 2**63, 17, None, 5]
    assert DeviceImages(one, ON_TORCH).encode_all(same, keys) == [
        one.encode(frame, key) for frame, key in zip(same, keys, strict=True)
    ]
    none = coder(augment=AugmentConfig(crop_area=1.0, brightness=0, contrast=0, saturation=0))
    assert DeviceImages(none, ON_TORCH).encode_all(same, keys) == [frame.tobytes() for frame in same]


def encoder_of(folder: Path, *overrides: str) -> tuple[RecordEncoder, Any]:
    write_model_folder(folder)
    config = make_config(
        folder,
        f"data.train_data_paths=[{DEMONSTRATIONS / 'train.jsonl'}]",
        f"data.cache_dir={folder / 'cache'}",
        "data.augment.enabled=true",
        *overrides,
    )
    prepared = prepare(config, splits=("train",))
    processor = Processor.build(config, prepared.codec)
    return RecordEncoder(config.data, processor, config.loader), prepared.entries["train"][0]


def test_records_of_a_device_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and actions are equal; pixels differ by less than a level on average; batches do not decide the bytes."""
    (tmp_path / "a").mkdir()
    on_cpu, manifest = encoder_of(tmp_path / "a")
    on_device = RecordEncoder(on_cpu.data, on_cpu.processor, ON_TORCH)
    expected, found = on_cpu.encode(manifest, 0, 0).samples, on_device.encode(manifest, 0, 0).samples
    assert len(expected) == len(found) >= 10
    differing = 0
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert one.timestep == other.timestep
        assert np.array_equal(one.action, other.action)
        assert len(one.images) == len(other.images) == 1
        pixels = [np.empty((64, 64, 3), np.uint8) for _ in range(2)]
        on_cpu.processor.decode_image(one.images[0], pixels[0])
        on_cpu.processor.decode_image(other.images[0], pixels[1])
        assert np.abs(pixels[0].astype(int) - pixels[1]).mean() < 1
        differing += one.images != other.images
    assert differing, "the device's code did not run"
    monkeypatch.setattr(module, "_MOST_FRAMES", 3)
    assert [sample.images for sample in on_device.encode(manifest, 0, 0).samples] == [s.images for s in found]


def test_a_bad_frame_is_refused_as_on_the_cpu() -> None:
    with pytest.raises(DataError, match=r"a frame is float32\[4, 4, 3\]"):
        DeviceImages(coder(), ON_TORCH).encode_all([np.zeros((4, 4, 3), np.float32)], [None])  # type: ignore[list-item]


def test_a_cpu_and_a_device_loader_do_not_serve_one_run_unless_allowed(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    overrides = [f"data.train_data_paths=[{DEMONSTRATIONS / 'train.jsonl'}]", f"data.cache_dir={tmp_path / 'cache'}"]
    found = {}
    for name, device, allowed in (("cpu", "cpu", "false"), ("gpu", "torch", "false"), ("any", "torch", "true")):
        config = make_config(tmp_path, *overrides, f"loader.device={device}", f"loader.allow_mixed_devices={allowed}")
        prepared = prepare(config, splits=("train",))
        found[name] = all_fingerprints(config, prepared, Processor.build(config, prepared.codec))
    differing = {name for name, value in found["cpu"].items() if found["gpu"][name] != value}
    assert differing == {"image_libraries"}
    assert found["gpu"]["image_libraries"].endswith("resize on torch 1")
    assert found["any"]["image_libraries"] == "any device (loader.allow_mixed_devices)"
    mixed = LoaderConfig(allow_mixed_devices=True)
    assert image_libraries("simplejpeg 1", mixed) == found["any"]["image_libraries"]
    assert image_libraries("none", LoaderConfig(device="cuda:900")) == "none"


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize(
    ("take_away", "expected"),
    [
        (without_torch, r"loader\.device is cuda:1: it needs torch; pip install 'stoker\[gpu\]'"),
        (without_cuda, r"loader\.device is cuda:1: torch \S+ finds 0 CUDA devices here; check nvidia-smi"),
    ],
)
def test_a_device_that_is_not_there_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, take_away: Callable[[pytest.MonkeyPatch], None], expected: str
) -> None:
    take_away(monkeypatch)
    with pytest.raises(ConfigError, match=expected):
        DeviceImages(coder(), LoaderConfig(device="cuda:1"))


@pytest.mark.parametrize("transport", ["jpeg", "base64"])
def test_what_an_encoder_on_the_device_returns_travels(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    """The encoder here is a stand-in with nvJPEG's interface and colours. nvJPEG itself needs a GPU."""
    torch = pytest.importorskip("torch")

    def encode(images: list[Any], quality: int) -> list[Any]:
        found = [image.permute(1, 2, 0).contiguous().numpy() for image in images]
        jpegs = [simplejpeg.encode_jpeg(image, quality, "RGB", "444") for image in found]
        return [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]

    one = coder(augment=AugmentConfig(), transport=transport)
    images = DeviceImages(one, ON_TORCH)
    monkeypatch.setattr(images, "_encoder", encode)
    smooth = frames(3, 96, 128)
    for data, frame in zip(images.encode_all(smooth, [None] * 3), smooth, strict=True):
        decoded = np.empty((48, 48, 3), np.uint8)
        one.decode(data, decoded)
        assert np.abs(decoded.astype(int) - one.pixels(frame, None)).mean() < 3


def test_nvjpeg_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"loader\.jpeg is device, and loader\.device is torch: nvJPEG needs cuda"):
        DeviceImages(coder(), LoaderConfig(device="torch", jpeg="device"))
    with pytest.raises(ConfigError, match=r"loader\.jpeg is device: it needs torchvision"):
        nvjpeg(LoaderConfig(device="cuda", jpeg="device"))


def test_another_word_is_no_device(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    config = make_config(tmp_path).loader
    assert (config.device, config.allow_mixed_devices) == ("cpu", False)
    with pytest.raises(ConfigError, match=r"loader\.device is gpu: write cpu, cuda, cuda:1 or torch"):
        load_config(tmp_path / "stoker.yaml", ["loader.device=gpu"])
