"""`lerobot`: mp4 files as other writers make them: joined of one file per episode, in fragments, without an edit list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.sources.lerobot.dataset import LeRobotDataset
from stoker_proto.errors import DataError

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

import av

from loader_service.sources.lerobot import video as video_module
from tests.loader_service.sources.lerobot.checks import FRONT, LENGTHS, TOP, assert_equal, data_config, samples, video
from tests.loader_service.sources.lerobot.files import change_info, change_table, write_lerobot
from tests.loader_service.sources.lerobot.reference import all_frames

FPS = 10
EVEN = (25, 24, 26, 25, 23, 24)
B_FRAMES = {"g": "2", "bf": "2", "threads": "1", "crf": "20"}
"""A keyframe every other frame, as lerobot sets it, and B-frames: keyframes are decoded a frame before they are shown."""
ENCODERS = {
    "libx264": B_FRAMES,
    "libx265": {
        "x265-params": "log-level=none:pools=none:frame-threads=1:no-wpp=1:keyint=2:min-keyint=2:bframes=2:open-gop=0"
    },
}
"""libx265 decodes two frames ahead: the second keyframe at the moment at which the first frame is shown."""


def remux(files: Sequence[Path], out: Path, *, shift: float = 0.0, **options: str) -> list[float]:
    """The packets of the files after one another, each file `shift` frames late; when each begins, in frames."""
    begins, duration = [], 0.0
    with av.open(out, "w", format="mp4", options=options) as target:
        stream: Any = None
        for file in files:
            with av.open(file) as source:
                template = source.streams.video[0]
                stream = stream or target.add_stream_from_template(template, opaque=True)
                ticks = 1 / (float(template.time_base) * FPS)
                for packet in source.demux(template):
                    if packet.dts is None:
                        continue
                    packet.pts += round(duration * ticks)
                    packet.dts += round(duration * ticks)
                    packet.stream = stream
                    target.mux(packet)
                begins.append(duration)
                duration += template.frames + shift
    return begins


def joined(root: Path, shift: float, lengths: Sequence[int] = EVEN) -> tuple[list[list[np.ndarray]], list[float]]:
    """A v3.0 data set whose one video is joined; the frames of each episode, and when each begins, in frames."""
    parts = root.parent / "parts"
    write_lerobot(parts, lengths, version="v2.1", videos=[FRONT], encoder=B_FRAMES)
    write_lerobot(root, lengths, videos=[FRONT], episodes_per_video_file=100, rows_per_data_file=1000)
    files = sorted(parts.glob("videos/**/*.mp4"))
    begins = remux(files, video(root), shift=shift)
    return [all_frames(file) for file in files], begins


def set_from_timestamp(root: Path, frames: Sequence[float]) -> None:
    (file,) = root.glob("meta/episodes/*/*.parquet")
    change_table(file, **{f"videos/{FRONT}/from_timestamp": lambda rows: [frame / FPS for frame in frames]})


def read_each(root: Path, **keys: Any) -> list[list[np.ndarray] | str]:
    """Of each episode the images, or why it is refused."""
    dataset = LeRobotDataset(data_config(root, **keys))
    found: list[list[np.ndarray] | str] = []
    for shard in dataset.locate(str(root)).paths:
        for record in dataset.scan(shard):
            try:
                found.append([image for s in dataset.read(shard, record.offset, record.size) for image in s.images])
            except DataError as error:
                found.append(str(error))
    return found


@pytest.mark.long
@pytest.mark.parametrize("shift", [-0.25, 0.25, -0.2, 0.1])
def test_joins_may_shift_the_time_stamps_if_from_timestamp_says_so(tmp_path: Path, shift: float) -> None:
    root = tmp_path / "set"
    expected, begins = joined(root, shift)
    set_from_timestamp(root, begins)
    np.testing.assert_array_equal(
        np.concatenate([np.stack(frames) for frames in read_each(root)]), np.concatenate(expected)
    )


def test_the_middle_of_a_joined_episode_is_found_too(tmp_path: Path) -> None:
    root = tmp_path / "set"
    expected, begins = joined(root, -0.25)
    set_from_timestamp(root, begins)
    still = [0.0, 0, 0, 0, 0, 0, 1]

    def wait(rows: list[list[float]]) -> list[list[float]]:  # the first 9 frames of every episode are no-ops
        starts = np.cumsum([0, *EVEN])
        return [still if i - starts[np.searchsorted(starts, i, "right") - 1] < 9 else row for i, row in enumerate(rows)]

    (file,) = root.glob("data/*/*")
    change_table(file, action=wait)
    found = read_each(root, drop_noops=True)
    for images, frames in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.stack(images), np.stack(frames[-len(images) :]))
        assert len(frames) - len(images) >= 8


def test_from_timestamps_that_the_video_does_not_have_are_refused_and_no_wrong_frame_is_given(tmp_path: Path) -> None:
    """Counted, not measured: off by 0, 0.2, 0.4 ... frames. Nearest in time, those from 0.6 on are the next frame."""
    root = tmp_path / "set"
    expected, _ = joined(root, -0.2)
    counted = np.cumsum([0, *EVEN[:-1]])
    set_from_timestamp(root, counted)
    found = read_each(root)
    for episode in (0, 1):
        np.testing.assert_array_equal(found[episode], expected[episode])
    for episode, off in {2: "-0.40", 3: r"\+0.40"}.items():
        text = found[episode]
        assert isinstance(text, str)
        at = f"{counted[episode] / FPS:.7g}"
        assert (
            f"{video(root)}: record episode {episode}, field from_timestamp: frame 0 of the episode is expected {at} s"
            in text
        )
        assert re.search(rf"the nearest one is {off} frames .* write the episode's from_timestamp anew", text)
    for episode in (4, 5):  # nearest to it is the next frame, hardly off
        text = found[episode]
        assert isinstance(text, str)
        assert "which it is by the lengths of the episodes before" in text
        assert f"frame {counted[episode]} of the file" in text


@pytest.mark.parametrize("begin", [0, 7])
def test_a_video_may_begin_at_any_time(tmp_path: Path, begin: int) -> None:
    """B-frames, one file per episode, and a rate that info.json rounds."""
    fps = Fraction(30000, 1001)
    root = write_lerobot(tmp_path / "set", LENGTHS, version="v2.1", videos=[FRONT])
    expected = []
    for file, length in zip(sorted(root.glob("videos/**/*.mp4")), LENGTHS, strict=True):
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options=B_FRAMES)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            for number in range(length):
                frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 15 * number, np.uint8), format="rgb24")
                frame.pts, frame.time_base = begin + number, 1 / fps
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        expected += all_frames(file)
    change_info(root, fps=29.97)
    for file in root.glob("data/*/*"):
        change_table(file, timestamp=lambda rows: [row * FPS / 29.97 for row in rows])
    np.testing.assert_array_equal([sample.images[0] for sample in samples(root)], expected)


WRITERS = {
    "fragments": {"movflags": "frag_keyframe"},
    "fragments alone": {"movflags": "frag_keyframe+empty_moov"},
    "a fragment per frame": {"movflags": "frag_every_frame+empty_moov"},
    "no edit list": {"use_editlist": "0"},
    "negative offsets": {"movflags": "negative_cts_offsets"},
}


@pytest.mark.long
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_other_writers(tmp_path: Path, writer: str, codec: str) -> None:
    """The second episode begins before the second keyframe is shown, and after it is decoded."""
    lengths = (1, *LENGTHS)
    root = write_lerobot(
        tmp_path / "set", lengths, videos=[FRONT], codec=codec, encoder=ENCODERS[codec], episodes_per_video_file=100
    )
    expected = all_frames(video(root))
    (tmp_path / "whole.mp4").write_bytes(video(root).read_bytes())
    remux([tmp_path / "whole.mp4"], video(root), **WRITERS[writer])
    np.testing.assert_array_equal([sample.images[0] for sample in samples(root)], expected)


@pytest.mark.long
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_of_a_long_file_without_an_edit_list_only_what_is_near_is_decoded(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [11] * 20
    root = write_lerobot(
        tmp_path / "set", lengths, videos=[FRONT], codec=codec, encoder=ENCODERS[codec], episodes_per_video_file=100
    )
    (tmp_path / "whole.mp4").write_bytes(video(root).read_bytes())
    remux([tmp_path / "whole.mp4"], video(root), use_editlist="0")
    decoded = 0
    original = video_module._from_keyframe

    def counting(*arguments: Any) -> Any:
        nonlocal decoded
        for frame in original(*arguments):
            decoded += 1
            yield frame

    monkeypatch.setattr(video_module, "_from_keyframe", counting)
    assert len(samples(root)) == sum(lengths)
    assert decoded < 2 * sum(lengths)


def test_an_episode_may_go_over_many_data_files(tmp_path: Path) -> None:
    """And over chunks; in most of these files no episode begins."""
    root = write_lerobot(tmp_path / "set", LENGTHS, videos=[FRONT], images=[TOP], rows_per_data_file=2, chunks_size=3)
    assert assert_equal(samples(root), root, [FRONT, TOP]) == sum(LENGTHS)
