"""Images of dialogues: where they stand, where they may lie, and what is no image."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from loader_service.sources.base import Sample
from loader_service.sources.chat import frames
from loader_service.sources.chat.dataset import LITERAL
from loader_service.sources.chat.frames import decode_image
from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.errors import DataError


def picture(colour: tuple[int, int, int], kind: str = "PNG", mode: str = "RGB") -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (6, 4), colour).convert(mode).save(sink, kind)
    return sink.getvalue()


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def read_row(write_table: Callable[..., Path], make_tables: Callable[..., TableDataset]) -> Callable[..., Sample]:
    def read(row: dict[str, Any], name: str = "data/a.jsonl", **keys: Any) -> Sample:
        shard = write_table(name, [row])
        dataset = make_tables("chat", **keys)
        (record,) = dataset.scan(shard)
        (sample,) = dataset.read(shard, record.offset, record.size)
        return sample

    return read


def test_images_belong_to_marks_in_order(tmp_path: Path, read_row: Callable[..., Sample]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "red.png").write_bytes(picture(RED))
    uri = "data:image/jpeg;base64," + base64.b64encode(picture(BLUE, "JPEG")).decode()
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "<image> or <image>?"},
            {"from": "gpt", "value": "The second."},
        ],
        "images": ["red.png", uri],
    }
    parts = [
        {"type": "image_url", "image_url": {"url": "red.png"}},
        {"type": "text", "text": " or "},
        {"type": "image_url", "image_url": uri},
        {"type": "text", "text": "?"},
    ]
    messages = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "The second."}]}
    for row in (sharegpt, messages):
        sample = read_row(row)
        assert sample.turns[0].text == "<image> or <image>?"
        red, blue = sample.images
        assert red.shape == blue.shape == (4, 6, 3)
        assert red.dtype == blue.dtype == np.uint8
        assert np.array_equal(red, np.full((4, 6, 3), RED))
        assert np.abs(blue.astype(int) - np.array(BLUE)).max() < 6  # JPEG


def test_images_without_marks_come_first(tmp_path: Path, read_row: Callable[..., Sample]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "red.png").write_bytes(picture(RED))
    row = {"instruction": "What?", "output": "Red.", "system": "See.", "images": ["red.png", "red.png"]}
    sample = read_row(row)
    assert [turn.text for turn in sample.turns] == ["See.", "<image>\n<image>\nWhat?", "Red."]
    assert len(sample.images) == 2


def test_images_of_dropped_turns_are_not_read(tmp_path: Path, read_row: Callable[..., Sample]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "red.png").write_bytes(picture(RED))
    turns = [
        {"from": "human", "value": "<image>?"},
        {"from": "gpt", "value": "Red."},
        {"from": "human", "value": "And <image>?"},
    ]
    assert len(read_row({"conversations": turns, "images": ["red.png", "missing.png"]}).images) == 1


def test_images_inside_of_parquet(read_row: Callable[..., Sample]) -> None:
    row = {"instruction": "What?", "output": "Red.", "images": [{"bytes": picture(RED), "path": None}]}
    assert read_row(row, "data/a.parquet").images[0][0, 0].tolist() == list(RED)


def test_text_that_says_image_is_text_where_there_are_none(read_row: Callable[..., Sample]) -> None:
    sample = read_row({"data": ["What is <image> in HTML?", "A mark."]})
    assert (sample.images, sample.notes) == ((), (LITERAL,))
    parts = [{"type": "text", "text": "What is <image>?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A mark."}]
    sample = read_row({"messages": messages})
    assert (sample.images, sample.notes) == ((), (LITERAL,))
    assert read_row({"data": ["What is a mark?", "<image> is one."]}).notes == ()


def colours(sample: Sample) -> list[str]:
    """Of the images' first pixels."""
    names = {RED: "red", BLUE: "blue"}
    return [names[tuple(image[0, 0].tolist())] for image in sample.images]


def said(question: Any, **row: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "It."}], **row}


@pytest.fixture
def pictures(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "red.png").write_bytes(picture(RED))
    (tmp_path / "data" / "blue.png").write_bytes(picture(BLUE))


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("name", ["data/a.jsonl", "data/a.parquet"])
def test_a_column_of_one_image(name: str, read_row: Callable[..., Sample]) -> None:
    """LLaVA's."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    images: list[Any] = ["red.png", {"path": "red.png"}]
    if name.endswith(".parquet"):
        images += [{"bytes": picture(RED), "path": None}, picture(RED)]
    for image in images:
        for column, columns in (("image", {}), ("images", {}), ("photo", {"images": "photo"})):
            sample = read_row({"conversations": turns, column: image}, name, columns=columns)
            assert colours(sample) == ["red"]
            assert sample.turns[0].text == "<image>\nWhat?"


BARE = {"type": "image"}
TEXT = {"type": "text", "text": "?"}


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": "red.png"},
        {"type": "image", "path": "red.png", "url": None},
        {"type": "image", "image": {"path": "red.png"}},
        {"type": "image_url", "image_url": {"url": "red.png", "detail": "low"}},
        {"type": "input_image", "image_url": "red.png"},
        {"type": "image", "base64": base64.b64encode(picture(RED)).decode()},
    ],
)
def test_a_part_has_its_own_image_at_its_place(part: dict[str, Any], read_row: Callable[..., Sample]) -> None:
    assert colours(read_row(said([part, TEXT]))) == ["red"]
    assert colours(read_row(said([part, BARE, TEXT], images=["blue.png"]))) == ["red", "blue"]
    sample = read_row(said([BARE, part, TEXT, {"type": "text", "text": "<image>"}], images=["blue.png", "blue.png"]))
    assert colours(sample) == ["blue", "red", "blue"]
    assert sample.turns[0].text == "<image><image>?<image>"


@pytest.mark.usefixtures("pictures")
def test_images_belong_to_user_and_tools(read_row: Callable[..., Sample]) -> None:
    turns = [
        {"from": "human", "value": "Compare, and write <image>."},
        {"from": "function_call", "value": '{"name": "shot", "arguments": {"mark": "<image>"}}'},
        {"from": "observation", "value": "<image>"},
        {"from": "gpt", "value": "Now <image>."},
    ]
    assert colours(read_row({"conversations": turns, "images": ["red.png", "blue.png"]})) == ["red", "blue"]
    shot = {"role": "tool", "content": [{"type": "image", "url": "blue.png"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "shot"}}]}
    messages = [{"role": "user", "content": "See."}, call, shot, {"role": "assistant", "content": "Blue."}]
    sample = read_row({"messages": messages})
    assert colours(sample) == ["blue"]
    assert [turn.text for turn in sample.turns][::2] == ["See.", "<image>"]


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (said([BARE, TEXT]), r"content\[0\]: an image part without image_url, .*, and the row has no images"),
        (said([{"type": "image_url", "image_url": {"url": None}}]), r"content\[0\]: an image part without"),
        (said([BARE, BARE], images=["red.png"]), r"1 images and 2 marks <image> in the texts"),
        (said([{"type": "image", "url": "red.png"}], images=["red.png"]), r"1 images and 0 marks .*1 more images are"),
        (
            {"messages": [{"role": "system", "content": [{"type": "image", "url": "red.png"}]}]},
            r"field messages\[0\]\.content\[0\]: an image in a turn of role system: images are read in those of user and",
        ),
        ({"data": ["Draw a cube.", "<image>"], "images": ["red.png"]}, r"1 images and 0 marks .*\(1 in others, which"),
    ],
)
def test_images_that_have_no_place_are_refused(
    row: dict[str, Any], message: str, read_row: Callable[..., Sample]
) -> None:
    with pytest.raises(DataError, match=message):
        read_row(row)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["../secret.png"], r"field images\[0\]: '../secret.png' leads outside"),
        (["/etc/hostname"], r"field images\[0\]: '/etc/hostname' leads outside"),
        (["link.png"], r"field images\[0\]: 'link.png' leads outside"),
        (["missing.png"], r"missing\.png: record .*a\.jsonl:1: there is no such file"),
        (["text.png"], r"text\.png: record .*a\.jsonl:1: no readable image"),
        (["pipe.png"], r"pipe\.png: record .*a\.jsonl:1: an image is expected \(it is no regular file\)"),
        (["https://example.org/a.png"], r"field images\[0\]: 'https://example.org/a.png': nothing is fetched"),
        (["data:image/png,abc"], r"field images\[0\]: 'data:image/png,abc': data:image/...;base64"),
        (["data:image/png;base64,!!"], r"field images\[0\]: a data URI that is no Base64"),
        (["data:image/png;base64,aGVsbG8="], r"field images\[0\]: no readable image"),
        ([5], r"field images\[0\]: int: a path, a data URI"),
        (["red.png"] * 3, r"field images: 3 images and 1 marks <image> in the texts"),
        (["red.png"] * 256, r"field images: 256 images: at most 255 are taken"),
    ],
)
def test_what_is_no_image_is_named(
    images: list[Any], message: str, tmp_path: Path, read_row: Callable[..., Sample]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(RED))
    (folder / "red.png").write_bytes(picture(RED))
    (folder / "text.png").write_text("no image")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DataError, match=message):
        read_row({"instruction": "<image>?", "output": "x", "images": images})


def test_a_wider_data_root_lets_more_be_read(tmp_path: Path, read_row: Callable[..., Sample]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(picture(RED))
    row = {"instruction": "What?", "output": "Red.", "images": ["pictures/red.png"]}
    assert len(read_row(row, data_root=str(tmp_path)).images) == 1


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "L"), ("PNG", "P"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("BMP", "RGB"), ("GIF", "P")],
)
def test_colours_become_rgb(kind: str, mode: str) -> None:
    pixels = decode_image(picture((200, 200, 200), kind, mode))
    assert pixels.shape == (4, 6, 3)
    assert np.abs(pixels.astype(int) - 200).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_turned_picture_is_the_right_way_up(kind: str, orientation: int) -> None:
    """As Pillow, `datasets` and transformers' `load_image` turn it."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16] = (255, 0, 0)
    stored[8:, 16:] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    sink = io.BytesIO()
    Image.fromarray(stored).save(
        sink, kind, exif=exif.tobytes(), **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {})
    )
    with Image.open(sink) as picture:
        expected = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    found = decode_image(sink.getvalue())
    assert found.shape == expected.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
    assert found.flags.c_contiguous
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_damaged_exif_says_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sink = io.BytesIO()
    Image.new("RGB", (6, 4), RED).save(sink, "JPEG", exif=exif.tobytes())
    data = sink.getvalue()
    for good, bad in ((b"Exif\0\0MM", b"Exif\0\0??"), (b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0MM\0*\xff\xff\xff\xff")):
        assert good in data
        assert decode_image(data.replace(good, bad)).shape == (4, 6, 3)


def test_grey_of_16_bits_is_refused() -> None:
    """Pillow would make it white."""
    sink = io.BytesIO()
    Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096).save(sink, "PNG")
    with pytest.raises(DataError, match=r"grey of more than 8 bits \(mode I;16\)"):
        decode_image(sink.getvalue())


def test_an_image_that_claims_to_be_huge_is_refused_unread() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="an image of 9000 x 9000 pixels: at most 50000000 are read"):
        decode_image(bomb)
    jpeg = bytearray(picture(RED, "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = b"\xf0\x00\xf0\x00"
    with pytest.raises(DataError, match="an image of 61440 x 61440 pixels"):
        decode_image(bytes(jpeg))


def test_a_large_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=r"an image of .* bytes: at most 10 are read"):
        decode_image(picture(RED))


def test_a_git_lfs_pointer_in_the_place_of_an_image(tmp_path: Path, read_row: Callable[..., Sample]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    row = {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Red"}],
        "images": ["a.png"],
    }
    with pytest.raises(DataError, match=r"a\.png: .*a Git LFS pointer, not the file itself: run `git lfs pull`"):
        read_row(row)
