"""`lerobot`: the frame of each row, in files with random GOPs, codecs and joins: that of a full decode, or an error."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

import av
import pyarrow.parquet as pq

from tests.loader_service.sources.lerobot.checks import FRONT, refusal, samples, video
from tests.loader_service.sources.lerobot.files import change_table, write_lerobot
from tests.loader_service.sources.lerobot.reference import all_frames
from tests.loader_service.sources.lerobot.test_videos import FPS, read_each, remux, set_from_timestamp

SIZE = (64, 96)
CASES = Path(os.environ.get("STOKER_SHARED_DATA", Path(__file__).parents[5] / "shared" / "data")) / "cases/video_offset"
Encode = Callable[[Path, int, int], None]


def encoder(random: np.random.Generator) -> tuple[str, dict[str, str]]:
    gop = str(random.choice([1, 2, 5, 12, 250]))
    if random.random() < 0.3:
        return "libsvtav1", {"g": gop, "crf": "40", "preset": "12", "svtav1-params": "lp=1"}
    open_gop = f"open-gop={random.integers(2)}"
    return "libx264", {
        "g": gop, "bf": str(random.integers(4)), "x264-params": open_gop, "crf": "24", "threads": "1", "preset": "veryfast",
    }  # fmt: skip


def write_frames(file: Path, first: int, count: int, codec: str, options: dict[str, str]) -> None:
    """Each frame of one data set is another one."""
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for number in range(first, first + count):
            pixels = np.full((*SIZE, 3), (number * 37 % 256, number * 101 % 256, number), np.uint8)
            pixels[number % 56 : number % 56 + 8, :40] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def random_set(root: Path, seed: int) -> tuple[list[list[np.ndarray]], list[float], float]:
    """A v3.0 data set with one video; each episode's frames by a full decode; begins of episodes, shift of a join."""
    random = np.random.default_rng(seed)
    lengths = random.integers(16, 30, random.integers(4, 7)).tolist()
    write_lerobot(root, lengths, videos=[FRONT], episodes_per_video_file=100, rows_per_data_file=1000, codec=None)
    codec, options = encoder(random)
    starts = np.cumsum([0, *lengths])
    shift = 0.0
    if seed % 2:
        shift = float(random.choice([0, 1 / 512, -0.15, 0.1, 0.15]))
        parts = []
        for number, length in enumerate(lengths):
            parts.append(root.parent / f"{number}.mp4")
            write_frames(parts[-1], int(starts[number]), length, codec, options)
        begins = remux(parts, video(root), shift=shift)
    else:
        write_frames(video(root), 0, int(starts[-1]), codec, options)
        begins = starts[:-1].tolist()
    decoded = all_frames(video(root))
    assert len(decoded) == starts[-1]
    return [decoded[a:b] for a, b in itertools.pairwise(starts)], begins, shift


def keep_episodes(root: Path, kept: list[int]) -> None:
    """Take the others out of `meta/`; their frames stay in the video."""
    (file,) = root.glob("meta/episodes/*/*.parquet")
    pq.write_table(pq.read_table(file, partitioning=None).take(kept), file)


def assert_right_or_refused(found: list[Any], expected: list[list[np.ndarray]]) -> int:
    """Number of episodes that were read."""
    read = 0
    for episode, (images, frames) in enumerate(zip(found, expected, strict=True)):
        if isinstance(images, str):
            assert re.search(rf"record episode {episode}, .*[+-][0-9.]+ frames", images), images
            continue
        np.testing.assert_array_equal(np.stack(images), np.stack(frames), err_msg=f"episode {episode}")
        read += 1
    return read


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_each_frame_is_that_of_a_full_decode_or_is_refused(tmp_path: Path, seed: int) -> None:
    root = tmp_path / "set"
    expected, begins, shift = random_set(root, seed)
    count = len(expected)
    random = np.random.default_rng(seed + 1000)
    set_from_timestamp(root, begins)
    assert assert_right_or_refused(read_each(root), expected) == count
    for per_episode in (0.3, -0.21):  # the table drifts, the video does not
        drifted = [max(begin + per_episode * i, 0) for i, begin in enumerate(begins)]
        set_from_timestamp(root, drifted)
        read = assert_right_or_refused(read_each(root), expected)
        assert 1 <= read < count or abs(per_episode) * (count - 1) <= 0.25 or min(drifted[1:]) == 0
    wrong = (random.random(count) < 0.5) & (np.arange(count) > 0)
    set_from_timestamp(root, [begin + off for begin, off in zip(begins, wrong, strict=True)])
    assert assert_right_or_refused(read_each(root), expected) == count - wrong.sum()
    set_from_timestamp(root, begins)  # episodes that only meta/ no longer has
    kept = sorted({0, *np.flatnonzero(random.random(count) < 0.5).tolist()})
    keep_episodes(root, kept)
    for episode, images in zip(kept, read_each(root), strict=True):
        if isinstance(images, str) and abs(shift) > 0.1:  # shifts of several removed joins are a frame's half together
            assert f"record episode {episode}, field from_timestamp: " in images
            continue
        np.testing.assert_array_equal(np.stack(images), np.stack(expected[episode]))


def one_gop(root: Path) -> list[list[np.ndarray]]:
    write_lerobot(root, [7] * 24, videos=[FRONT], episodes_per_video_file=100, rows_per_data_file=1000, codec=None)
    write_frames(video(root), 0, 168, "libx264", {"g": "250", "bf": "2", "threads": "1", "crf": "20"})
    set_from_timestamp(root, [7.05 * i for i in range(24)])
    decoded = all_frames(video(root))
    return [decoded[7 * i : 7 * i + 7] for i in range(24)]


@pytest.mark.long
@pytest.mark.parametrize("removed", [False, True])
def test_a_drift_of_a_whole_frame_is_no_agreement(tmp_path: Path, removed: bool) -> None:
    """One keyframe. Episode 20 begins, by its from_timestamp, exactly at the next frame."""
    root = tmp_path / "set"
    expected = one_gop(root)
    episodes = list(range(24))
    if removed:  # the video has more frames than meta/
        episodes.remove(23)
        keep_episodes(root, episodes)
    found = read_each(root)
    for episode in episodes:
        if episode <= 5:
            np.testing.assert_array_equal(np.stack(found[episode]), np.stack(expected[episode]))
        elif episode < 15:
            assert "the nearest one is" in found[episode]
        else:
            assert f"record episode {episode}, field from_timestamp: frame 0 of the episode is by its from_timestamp +1 frames" in found[episode]  # noqa: E501  # fmt: skip


def test_the_case_of_the_shared_data() -> None:
    if not CASES.is_dir():
        pytest.skip(f"NOT TESTED: {CASES} is not there; set STOKER_SHARED_DATA to the folder that holds cases/")
    text = refusal(CASES, episodes=["0-5", "15-22"])
    assert "record episode 15, field from_timestamp: frame 0 of the episode is by its from_timestamp +1 frames" in text
    assert len(samples(CASES, episodes=["0-5"])) == 42


@pytest.mark.long
@pytest.mark.parametrize("gop", ["2", "12", "250"])
def test_match_frames_by_frame_index_ignores_clocks_that_drift(tmp_path: Path, gop: str) -> None:
    """The video and the table are stamped by clocks of their own."""
    root = write_lerobot(
        tmp_path / "set", [30, 40, 30], videos=[FRONT], episodes_per_video_file=100, rows_per_data_file=1000
    )
    random = np.random.default_rng(0)
    with av.open(video(root), "w", format="mp4") as container:
        options = {"g": gop, "bf": "2", "threads": "1", "crf": "20"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(100):
            pixels = np.full((*SIZE, 3), (number * 37 % 256, number * 101 % 256, number), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = 104 * number + int(random.integers(0, 60)), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for file in root.glob("data/*/*"):
        change_table(file, timestamp=lambda rows: [row * 1.07 for row in rows])
    assert "match_frames: frame_index if its clock drifts" in refusal(root)
    found = [sample.images[0] for sample in samples(root, match_frames="frame_index")]
    np.testing.assert_array_equal(np.stack(found), np.stack(all_frames(video(root))))
    some = [sample.images[0] for sample in samples(root, match_frames="frame_index", episodes=[1])]
    np.testing.assert_array_equal(np.stack(some), np.stack(all_frames(video(root))[30:70]))
    keep_episodes(root, [0, 1])
    text = refusal(root, match_frames="frame_index")
    assert "record episode 1: 100 frames, and its episodes have 70 rows: frames cannot be counted" in text
