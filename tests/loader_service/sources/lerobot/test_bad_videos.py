"""`lerobot`: a video that cannot be is one line that names the file and the episode."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker_proto.errors import DataError

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

import av

from tests.loader_service.sources.lerobot.checks import (
    FRONT,
    SHORT,
    data_file,
    read_all,
    refusal,
    scanned,
    video,
)
from tests.loader_service.sources.lerobot.files import change_info, change_table, write_lerobot


def test_a_missing_video(old: Path) -> None:
    file = sorted(old.glob("videos/**/*.mp4"))[1]
    file.unlink()
    text = refusal(old)
    assert f"record episode 1, field {FRONT}: the video {file} is missing" in text
    assert [record.error is not None for record in scanned(old)] == [False, True, False]


@pytest.mark.parametrize(
    ("written_as", "expected"),
    [
        ({"fps": 20}, "20 frames per second, and info.json says 10"),
        ({"size": (80, 96)}, "80x96 pixels (height x width), and info.json says 64x96"),
        ({"lengths": (4, 3)}, "it ends before frame 3 of the episode: the video is too short"),
    ],
)
def test_a_video_of_another_recording(new: Path, tmp_path: Path, written_as: dict[str, Any], expected: str) -> None:
    keys = {"lengths": SHORT, **written_as}
    other = write_lerobot(tmp_path / "other", keys.pop("lengths"), videos=[FRONT], **keys)
    shutil.copy(video(other), video(new))
    text = refusal(new)
    assert f"{video(new)}: record episode" in text
    assert expected in text


def test_a_video_with_a_gap(new: Path) -> None:
    """Of the right rate on the whole; by counting alone, all frames after the gap would be those of another moment."""
    with av.open(video(new), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"threads": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for number in [*range(12), *range(14, 22)]:
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(video(new)) as container:
        found = container.streams.video[0].average_rate
    change_info(new, fps=float(found))
    change_table(data_file(new), timestamp=lambda rows: [row * 10 / float(found) for row in rows])
    text = refusal(new)
    assert "frames off its time at 9." in text
    assert "data.options.match_frames: frame_index" in text


def test_a_video_whose_second_half_was_never_written(new: Path) -> None:
    file = video(new)
    content = bytearray(file.read_bytes())
    start, stop = content.index(b"mdat") + 4, content.index(b"moov") - 4
    middle = (start + stop) // 2
    content[middle:stop] = bytes(stop - middle)
    file.write_bytes(content)
    text = refusal(new)
    assert text.startswith(f"{file}: record episode ")


@pytest.mark.parametrize("content", [b"", b"<html>", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"])
def test_a_video_that_is_none(new: Path, content: bytes) -> None:
    video(new).write_bytes(content)
    assert f"{video(new)}: record episode 0: the video cannot be read" in refusal(new)


@pytest.mark.long
def test_flipped_bytes_of_a_video_end_in_one_error(new: Path) -> None:
    """libav goes on after damage and paints over it; almost all of it is noticed."""
    file = video(new)
    whole = file.read_bytes()
    start, stop = whole.index(b"mdat") + 800, whole.index(b"moov") - 4
    random = np.random.default_rng(0)
    caught = []
    for _ in range(60):
        content = bytearray(whole)
        for at in random.integers(start, stop, 3):
            content[at] ^= 1 << int(random.integers(8))
        file.write_bytes(content)
        try:
            read_all(new, image_keys=[FRONT])
        except DataError as error:
            caught.append(str(error))
    assert len(caught) > 50
    assert all(str(file) in text for text in caught)


@pytest.mark.long
def test_flipped_bytes_of_a_header_end_in_one_error_or_none(new: Path) -> None:
    file = video(new)
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    caught = []
    for _ in range(60):
        content = bytearray(whole)
        for at in random.integers(whole.index(b"moov"), len(whole), 3):
            content[at] ^= 1 << int(random.integers(8))
        file.write_bytes(content)
        try:
            read_all(new, image_keys=[FRONT])
        except DataError as error:
            caught.append(str(error))
    assert caught
    assert all(str(file) in text for text in caught)
