"""`lerobot`: both layouts -> samples, equal to a whole decode of every file."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loader_service.sources.base import Sample
from loader_service.sources.lerobot.dataset import LeRobotDataset
from stoker_proto.errors import ConfigError, DataError

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

import pyarrow as pa

from tests.loader_service.sources.lerobot.checks import (
    FRONT,
    LENGTHS,
    TOP,
    VERSIONS,
    WRIST,
    assert_equal,
    data_config,
    records,
    samples,
)
from tests.loader_service.sources.lerobot.files import TASKS, change_info, change_table, write_lerobot

ROOT = Path(__file__).parents[4]
CODECS = ("libx264", "libx265", "libsvtav1")


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("codec", CODECS)
def test_every_frame_equals_a_whole_decode(tmp_path: Path, version: str, codec: str) -> None:
    size = (128, 192) if codec == "libx265" else (64, 96)  # x265 writes damaged files of very small frames
    root = write_lerobot(tmp_path / "set", LENGTHS, version=version, codec=codec, images=[TOP], size=size)
    assert assert_equal(samples(root), root, [FRONT, WRIST, TOP]) == sum(LENGTHS)


def test_rows_of_pixels_may_be_padded(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", [3], size=(66, 98), codec="libx264")
    assert assert_equal(samples(root), root, [FRONT, WRIST]) == 3


def test_the_writer_covers_what_it_should(tmp_path: Path) -> None:
    """Episodes that cross data files, files of several episodes, several chunks; long groups of pictures, B-frames."""
    root = write_lerobot(tmp_path / "set", LENGTHS)
    shards = LeRobotDataset(data_config(root)).locate(str(root))
    assert shards.names == (
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "data/chunk-001/file-000.parquet",
    )
    assert len(list(root.glob("videos/*/chunk-001/file-000.mp4"))) == 2


@pytest.mark.parametrize("row_group_size", [2, 16, 1000])
def test_row_groups_may_hold_any_number_of_rows(tmp_path: Path, row_group_size: int) -> None:
    root = write_lerobot(
        tmp_path / "set", LENGTHS, videos=(), images=[TOP], row_group_size=row_group_size, rows_per_data_file=1000
    )
    assert assert_equal(samples(root), root, [TOP]) == sum(LENGTHS)


def test_of_a_shared_video_only_what_the_episode_needs_is_decoded(tmp_path: Path) -> None:
    """The first episode's frames are no video any more, and the second is read all the same, from its own keyframe on."""
    root = write_lerobot(tmp_path / "set", [14, 6], videos=[FRONT], rows_per_data_file=100)
    expected = [sample.images[0] for sample in samples(root)][14:]
    (mp4,) = root.glob("videos/**/*.mp4")
    content = bytearray(mp4.read_bytes())
    start, stop = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start : start + (stop - start) // 2] = bytes((stop - start) // 2)
    mp4.write_bytes(content)
    dataset = LeRobotDataset(data_config(root, episodes=[1])).for_split("train")
    ((_, found),) = records(dataset, root)
    np.testing.assert_array_equal([sample.images[0] for sample in found], expected)
    with pytest.raises(DataError):
        samples(root)


def test_lists_without_a_fixed_size_are_read_too(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", [5], videos=(), version="v2.1")
    expected = samples(root)
    change_table(next(root.glob("data/*/*")), action=lambda rows: pa.array(rows, pa.list_(pa.float64())))
    for a, b in zip(samples(root), expected, strict=True):
        np.testing.assert_array_equal(a.action, b.action)


def real(name: str) -> Path:
    root = Path(os.environ.get("STOKER_SHARED_DATA", ROOT.parent / "shared" / "data")) / name
    if not root.exists():
        pytest.skip(f"NOT TESTED on real episodes: no {root}; set STOKER_SHARED_DATA to the folder that holds {name}")
    return root


@pytest.mark.long
@pytest.mark.parametrize("name", ["lerobot_v21", "lerobot_v3"])
def test_real_episodes_equal_a_whole_decode(name: str) -> None:
    keys = ["observation.images.image_0", "observation.images.image_1"]
    root = real(name)
    assert assert_equal(samples(root), root, keys) == 250


def assert_same_but_for_pixels(a: Sample, b: Sample) -> None:
    assert (a.instruction, a.timestep, len(a.images)) == (b.instruction, b.timestep, len(b.images))
    for name in ("state", "action", "action_is_pad"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.long
def test_both_versions_of_the_real_episodes_are_the_same_samples() -> None:
    """Their videos were encoded apart, lossily: the frames are alike, and those of no other episode are."""
    old, new = (samples(real(name), chunk=4) for name in ("lerobot_v21", "lerobot_v3"))
    for a, b in zip(old, new, strict=True):
        assert_same_but_for_pixels(a, b)
    for camera in range(2):
        x, y = (
            np.stack([s.images[camera] for s in of_set]).reshape(25, -1).astype(np.float32) for of_set in (old, new)
        )
        distance = np.stack([np.abs(episode - y).mean(axis=1) for episode in x])  # [25, 25]
        assert distance.argmin(axis=1).tolist() == list(range(25))
        assert distance.diagonal().max() < 5


def test_both_versions_of_the_same_files_are_the_same_samples(tmp_path: Path) -> None:
    old = write_lerobot(tmp_path / "old", LENGTHS, version="v2.1", images=[TOP])
    new = write_lerobot(tmp_path / "new", LENGTHS, version="v3.0", images=[TOP], episodes_per_video_file=1)
    for key, e in itertools.product((FRONT, WRIST), range(len(LENGTHS))):
        mp4 = f"videos/{key}/chunk-{e // 2:03d}/file-{e % 2:03d}.mp4"
        shutil.copy(old / f"videos/chunk-{e // 2:03d}/{key}/episode_{e:06d}.mp4", new / mp4)
    for a, b in zip(*(samples(root, chunk=3, image_history=[-0.2, 0]) for root in (old, new)), strict=True):
        assert_same_but_for_pixels(a, b)
        np.testing.assert_array_equal(a.images, b.images)


def test_version_2_0_lies_on_disk_as_2_1(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", [3], version="v2.1")
    change_info(root, codebase_version="v2.0")
    assert [sample.instruction for sample in samples(root)] == [TASKS[0]] * 3


def test_files_of_a_download_cache_may_be_links(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "snapshots" / "set", LENGTHS)
    expected = samples(root)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate([*root.glob("data/*/*"), *root.glob("videos/*/*/*")]):
        blob = shutil.move(file, tmp_path / "blobs" / str(number))
        file.symlink_to(blob)
    dataset = LeRobotDataset(dataclasses.replace(data_config(root), data_root=str(tmp_path)))
    found = [sample for _, of_record in records(dataset, root) for sample in of_record]
    assert [s.action.tolist() for s in found] == [s.action.tolist() for s in expected]


def test_an_entry_may_hold_several_data_sets(tmp_path: Path) -> None:
    for number, version in enumerate(VERSIONS):
        write_lerobot(tmp_path / f"robots/arm-{number}", [3, 2], version=version, videos=(), seed=number)
    whole = samples(tmp_path / "robots")
    assert len(whole) == 10
    assert [s.action.tolist() for s in samples(tmp_path / "robots/arm-*")] == [s.action.tolist() for s in whole]
    with pytest.raises(ConfigError, match=r"no meta/info\.json"):
        samples(tmp_path / "robots/leg-*")


def test_a_data_set_is_not_left_out_in_silence(tmp_path: Path) -> None:
    robots = tmp_path / "robots"
    for name in ("arm-a", "arm-b", "user/arm-c"):
        write_lerobot(robots / name, [3], videos=())
    deeper = r"'\S*user/arm-c' is a LeRobot data set that the entry does not reach: name '\S*user/\*' as well"
    for entry in ("robots", "robots/*", "robots/u*"):
        with pytest.raises(ConfigError, match=deeper):
            samples(tmp_path / entry)
    assert len(samples(robots / "**")) == 9  # this reaches all three, and folders within them
    shutil.move(robots / "user", tmp_path / "elsewhere")
    (robots / "notes").mkdir()
    (robots / ".cache" / "data").mkdir(parents=True)
    assert len(samples(robots)) == len(samples(robots / "*")) == 6
    shutil.rmtree(robots / "arm-b" / "meta")  # a download that was interrupted
    for entry in ("robots", "robots/*", "robots/arm-b"):
        with pytest.raises(ConfigError, match=r"arm-b' (has data/, and|names no LeRobot data set:) no meta/info\.json"):
            samples(tmp_path / entry)


@pytest.mark.process
def test_a_loader_without_the_libraries_starts_and_says_what_is_missing(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['av'] = None\n"
        "import importlib.util as u; u.find_spec = lambda name, find=u.find_spec: None if name == 'av' else find(name)\n"
        "import loader_service.server.command\n"
        "from loader_service.sources.base import make_dataset\n"
        "from stoker_proto.config import DataConfig\n"
        "assert 'pyarrow' not in sys.modules\n"
        "make_dataset(DataConfig(dataset_type='lerobot', train_data_paths=('x',), max_seq_len=8))\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.stderr.strip().splitlines()[-1].endswith("needs the library av: run `pip install 'stoker[lerobot]'`")
