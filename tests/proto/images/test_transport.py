"""Frames to transported bytes and back; the augmentation is a function of its key."""

import base64
import dataclasses
import hashlib
import logging
import re
import threading
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray

from stoker_proto.config import AugmentConfig, ImageConfig
from stoker_proto.errors import DataError, RemoteProtocolError
from stoker_proto.hashing import keyed_hashes
from stoker_proto.images.augment import crop_box, jitter
from stoker_proto.images.resize import pillow_resize
from stoker_proto.images.spec import ImageSpec
from stoker_proto.images.transport import ImageCoder, depth_to_rgb
from stoker_proto.images.transport_cost import log_choice, measure

SPEC = ImageSpec(
    family="llava",
    height=64,
    width=64,
    steps=(("shortest", 64, 0), ("crop", 64, 64)),
    resample="bicubic",
    rescale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    num_tokens=16,
    token="<image>",
    token_id=9,
)
ROWS, COLUMNS = np.mgrid[:96, :128]
FRAME = np.stack([ROWS * 2, COLUMNS, 255 - ROWS - COLUMNS // 2], axis=-1).astype(np.uint8)
FITTING = np.ascontiguousarray(FRAME[:64, :64])


def coder(transport: Any = "base64", quality: int = 95, **augment: float) -> ImageCoder:
    return ImageCoder(SPEC, ImageConfig(transport=transport, quality=quality), AugmentConfig(**augment))


@pytest.mark.parametrize("transport", ["base64", "jpeg", "pixels"])
def test_round_trip(transport: str) -> None:
    ours, out = coder(transport), np.empty((64, 64, 3), np.uint8)
    data = ours.encode(FRAME, None)
    ours.decode(data, out)
    pixels = ours.pixels(FRAME, None)
    if transport == "pixels":
        assert data == pixels.tobytes()
        assert np.array_equal(out, pixels)
    else:
        jpeg = base64.b64decode(data, validate=True) if transport == "base64" else data
        assert simplejpeg.decode_jpeg_header(jpeg) == (64, 64, "YCbCr", "420")
        assert np.array_equal(out, simplejpeg.decode_jpeg(jpeg))
        assert np.abs(out.astype(int) - pixels).mean() < 2


def test_auto_is_jpeg_and_says_what_each_costs(caplog: pytest.LogCaptureFixture) -> None:
    assert coder("auto").encode(FRAME, None) == coder("jpeg").encode(FRAME, None)
    out, same = np.empty((2, 64, 64, 3), np.uint8)
    coder("auto").decode(coder("auto").encode(FRAME, None), out)
    coder("base64").decode(coder("base64").encode(FRAME, None), same)
    assert np.array_equal(out, same)
    with caplog.at_level("INFO"):
        log_choice(logging.getLogger("stoker"), ImageConfig(transport="base64"), SPEC)
        assert not caplog.messages
        log_choice(logging.getLogger("stoker"), ImageConfig(transport="auto"), SPEC)
    (line,) = caplog.messages
    assert line.startswith("data.image.transport: auto is jpeg, the cheapest that trains the same pixels as base64.")
    assert re.search(r"base64 \d.+ KB; jpeg \d.+ KB; pixels \d.+ ms, 12 KB", line)
    costs = measure(ImageConfig(), SPEC)
    assert costs["pixels"][2] == 64 * 64 * 3
    assert costs["base64"][2] == -(-costs["jpeg"][2] // 3) * 4


def test_quality_is_the_configs() -> None:
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sizes = [len(coder("jpeg", quality).encode(random, None)) for quality in (20, 60, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 3


def test_a_frame_that_fits_is_not_touched() -> None:
    assert coder().pixels(FITTING, None) is FITTING
    read_only = FITTING.copy()
    read_only.flags.writeable = False
    assert coder().encode(read_only, None) == coder().encode(FITTING, None)


def test_padding_takes_its_colour() -> None:
    spec = dataclasses.replace(SPEC, steps=(("square", 0, 0), ("fixed", 64, 64)), pad_colour=(1, 2, 3))
    pixels = ImageCoder(spec, ImageConfig(), AugmentConfig()).pixels(np.full((32, 64, 3), 200, np.uint8), None)
    assert pixels[0, 0].tolist() == [1, 2, 3]
    assert pixels[16, 0].tolist() == [200, 200, 200]
    assert pixels[63, 63].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("steps", "made"),
    [
        ((("square", 0, 0), ("fixed", 64, 64)), "pad makes 65535 x 65535"),
        ((("letterbox", 0, 0), ("fixed", 64, 64)), "pad makes 65535 x 65535"),
        ((("shortest", 224, 0), ("crop", 64, 64)), "resize makes 224 x 14679840"),
    ],
)
def test_a_line_of_pixels_is_refused_before_it_becomes_gigabytes(steps: Any, made: str) -> None:
    """A JPEG of a few kilobytes may be one; the longest is 65535."""
    narrow = ImageCoder(dataclasses.replace(SPEC, steps=steps), ImageConfig(), AugmentConfig())
    with pytest.raises(
        DataError, match=f"an image of 1 x 65535 pixels: the model's {made} of it, and at most 268435456"
    ):
        narrow.encode(np.zeros((1, 65535, 3), np.uint8), None)
    assert narrow.pixels(np.zeros((8, 400, 3), np.uint8), None).shape == (64, 64, 3)


def test_depth_is_grey_by_distance() -> None:
    depth = np.array([[0, 1000, 2000, 65535]], np.uint16)
    assert depth_to_rgb(depth, 2000).tolist() == [[[0, 0, 0], [128, 128, 128], [255, 255, 255], [255, 255, 255]]]
    data = ImageCoder(SPEC, ImageConfig(transport="pixels"), AugmentConfig()).encode(
        np.full((64, 64), 1000, np.uint16), None
    )
    assert set(data) == {128}


BAD_FRAMES: list[tuple[NDArray[Any], str]] = [
    (np.zeros((4, 4), np.uint8), r"uint8\[4, 4\]: uint8\[H, W, 3\] or depth"),
    (np.zeros((4, 4, 4), np.uint8), r"uint8\[4, 4, 4\]"),
    (np.zeros((4, 4, 3), np.float32), r"float32\[4, 4, 3\]"),
    (np.zeros((0, 4, 3), np.uint8), r"a frame is empty"),
]


@pytest.mark.parametrize(("frame", "message"), BAD_FRAMES)
def test_other_frames_are_refused(frame: NDArray[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        coder().encode(frame, None)


def bad_bytes() -> dict[str, tuple[str, bytes, str]]:
    good = coder("jpeg").encode(FRAME, None)
    large = simplejpeg.encode_jpeg(np.zeros((64, 72, 3), np.uint8))
    frame_header = good.index(b"\xff\xc0")  # marker, length, precision, then height and width
    absurd = good[: frame_header + 5] + b"\xff\xdc" * 2 + good[frame_header + 9 :]  # 65,500 x 65,500: 12 GB of pixels
    return {
        "not base64": ("base64", b"!" * 40, "no base64"),
        "base64 of nothing": ("base64", b"", "no base64"),
        "line feeds": ("base64", base64.encodebytes(good), "no base64"),
        "not a JPEG": ("jpeg", b"<html></html>", "no jpeg"),
        "cut short": ("jpeg", good[: len(good) // 2], "no jpeg"),
        "another size": ("jpeg", large, "64 x 72: 64 x 64 is expected"),
        "absurd size": ("jpeg", absurd, "65500 x 65500: 64 x 64 is expected"),
        "absurd size in Base64": ("base64", base64.b64encode(absurd), "65500 x 65500: 64 x 64 is expected"),
        "padded": ("jpeg", good + b"\0" * 10**6, "an image of 10"),
        "pixels": ("pixels", b"\0" * 5, "5 bytes: 12288 pixel bytes"),
    }


@pytest.mark.parametrize("case", bad_bytes())
def test_bad_bytes_are_refused(case: str) -> None:
    transport, data, message = bad_bytes()[case]
    with pytest.raises(RemoteProtocolError, match=message):
        coder(transport).decode(data, np.empty((64, 64, 3), np.uint8))


def test_decode_refuses_a_wrong_buffer() -> None:
    with pytest.raises(ValueError, match=r"C-contiguous uint8\[64, 64, 3\]"):
        coder().decode(b"", np.empty((64, 64, 4), np.uint8))
    with pytest.raises(ValueError, match="C-contiguous"):
        coder().decode(b"", np.empty((64, 128, 3), np.uint8)[:, ::2])


def test_threads_make_the_same_bytes() -> None:
    ours, expected = coder(), coder().encode(FRAME, 5)
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.extend(ours.encode(FRAME, 5) for _ in range(50))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 200


def test_augmentation_is_pinned() -> None:
    """Its bytes are part of what a ticket means: they change only on purpose."""
    frame = (np.arange(48 * 64 * 3) * 37 % 256).astype(np.uint8).reshape(48, 64, 3)
    pixels = jitter(frame, AugmentConfig(), 12345)
    assert crop_box(480, 640, 0.9, 12345) == (13, 8, 455, 607)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "0c5c86ede0daab29"


def test_augmentation_follows_its_key_alone() -> None:
    ours = coder("pixels")
    assert ours.encode(FRAME, 1) == ours.encode(FRAME, 1) == coder("pixels").encode(FRAME, 1)
    assert len({ours.encode(FRAME, key) for key in [None, *range(20)]}) == 21
    still = coder("pixels", crop_area=1.0, brightness=0.0, contrast=0.0, saturation=0.0)
    assert still.encode(FRAME, 1) == still.encode(FRAME, None) == ours.encode(FRAME, None)


def test_crop_keeps_its_area_and_reaches_every_edge() -> None:
    boxes = [crop_box(100, 200, 0.81, key) for key in range(2000)]
    assert {box[2:] for box in boxes} == {(90, 180)}
    assert (min(box[0] for box in boxes), max(box[0] for box in boxes)) == (0, 10)
    assert (min(box[1] for box in boxes), max(box[1] for box in boxes)) == (0, 20)
    ours = coder("pixels", crop_area=0.81, brightness=0.0, contrast=0.0, saturation=0.0)
    top, left, height, width = crop_box(96, 128, 0.81, 3)
    assert ours.encode(FRAME, 3) == ours.encode(
        np.ascontiguousarray(FRAME[top : top + height, left : left + width]), None
    )


def test_depth_gets_the_crop_of_its_colour_frame_and_keeps_its_levels() -> None:
    ours = coder("pixels")
    marked, depth = np.zeros((96, 128, 3), np.uint8), np.zeros((96, 128), np.uint16)
    marked[40:50, 60:70], depth[40:50, 60:70] = 255, 2000
    plain = coder("pixels", brightness=0.0, contrast=0.0, saturation=0.0)
    assert plain.encode(marked, 77) == ours.encode(depth, 77)


def reference(pixels: NDArray[np.uint8], brightness: float, contrast: float, saturation: float) -> NDArray[np.float64]:
    """The three changes one after the other, in floating point, without clipping in between."""

    def grey(image: NDArray[np.float64]) -> NDArray[np.float64]:
        return image @ np.array([77, 150, 29]) / 256

    bright = pixels * brightness
    mixed = saturation * bright + (1 - saturation) * grey(bright)[..., None]
    return np.clip(contrast * mixed + (1 - contrast) * grey(mixed).mean(), 0, 255)


@pytest.mark.parametrize("changed", ["brightness", "contrast", "saturation", "all"])
def test_jitter_equals_its_definition(changed: str) -> None:
    names = ["brightness", "contrast", "saturation"]
    config = AugmentConfig(**{name: 0.3 if changed in (name, "all") else 0.0 for name in names})
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    drawn = []
    for key in range(40):
        factors = {
            name: 1 + (int(number) % 615 - 307) / 1024 if changed in (name, "all") else 1.0  # 307 = round(0.3 * 1024)
            for name, number in zip(names, keyed_hashes(5, key)[2:], strict=True)
        }
        assert (
            np.abs(reference(pixels, **factors) - jitter(pixels, config, key)).max() < 1.6
        )  # grey and the sum are rounded
        drawn.append(factors[names[0] if changed == "all" else changed])
    assert 0.7 <= min(drawn) < 0.75
    assert 1.25 < max(drawn) <= 1.3


def test_pillow_fallback_gives_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = coder().pixels(FRAME, None).astype(int)
    monkeypatch.setattr("stoker_proto.images.transport.best_resize", lambda: (pillow_resize(), "pillow 0"))
    fallback = coder()
    assert np.abs(fallback.pixels(FRAME, None) - expected).max() <= 2
    assert fallback.libraries.endswith(", pillow 0")
