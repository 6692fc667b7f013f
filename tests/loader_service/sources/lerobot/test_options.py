"""`lerobot`: cameras, columns, moments and episodes that the options choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.sources.actions import is_noop
from loader_service.sources.base import make_dataset
from loader_service.sources.lerobot.dataset import LeRobotDataset
from loader_service.sources.trajectory import moments
from stoker_proto.errors import ConfigError

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")


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
from tests.loader_service.sources.lerobot.files import change_table, write_lerobot
from tests.loader_service.sources.lerobot.reference import reference


def test_cameras_come_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", LENGTHS, images=[TOP])
    assert assert_equal(samples(root, image_keys=[TOP, FRONT]), root, [TOP, FRONT]) == sum(LENGTHS)
    assert all(sample.images == () for sample in samples(root, image_keys=[]))


def test_state_action_and_instruction_can_be_named(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", [3], videos=())
    for sample, expected in zip(
        samples(root, state_key="action", action_key="observation.state", instruction="wave"),
        reference(root),
        strict=True,
    ):
        assert sample.instruction == "wave"
        np.testing.assert_array_equal(sample.state, expected["action"])
        np.testing.assert_array_equal(sample.action[0], expected["state"])


def lerobot_query(t: int, length: int, deltas: Sequence[int]) -> tuple[list[int], list[bool]]:
    """lerobot's own rule, `LeRobotDataset._get_query_indices`, with the episode's rows counted from 0."""
    start, end = 0, length
    indices = [max(start, min(end - 1, t + delta)) for delta in deltas]
    return indices, [(t + delta < start) | (t + delta >= end) for delta in deltas]


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("deltas", [None, [-2, 0, 1, 5], [3, 1, 2, 0]])
def test_chunks_and_history_are_padded_by_lerobots_rule(tmp_path: Path, version: str, deltas: list[int] | None) -> None:
    root = write_lerobot(tmp_path / "set", LENGTHS, version=version, codec="libx264")
    options: dict[str, Any] = {"image_history": [-0.5, -0.2, -0.1, 0]}
    if deltas is not None:
        options["action_delta_timestamps"] = [delta / 10 for delta in deltas]
    frames = list(reference(root))
    starts = np.cumsum([0, *LENGTHS])
    found = samples(root, chunk=4, **options)
    assert len(found) == len(frames)
    for sample, expected in zip(found, frames, strict=True):
        start, length = int(starts[expected["episode"]]), LENGTHS[expected["episode"]]
        index, pad = lerobot_query(sample.timestep, length, deltas or [0, 1, 2, 3])
        np.testing.assert_array_equal(sample.action, [frames[start + i]["action"] for i in index])
        assert sample.action_is_pad.tolist() == pad
        index, _ = lerobot_query(sample.timestep, length, [-5, -2, -1, 0])
        wanted = [frames[start + i]["images"][key] for key in (FRONT, WRIST) for i in index]
        for image, frame in zip(sample.images, wanted, strict=True):
            np.testing.assert_array_equal(image, frame)


def test_the_last_action_is_repeated_as_in_mani_openpi(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", [7], videos=())
    actions = np.stack([expected["action"] for expected in reference(root)])
    np.testing.assert_array_equal(
        [sample.action for sample in samples(root, chunk=5)], actions[moments(7, np.arange(5)).positions]
    )


def test_noops_are_left_out_and_chunks_are_made_of_what_is_left(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", [8], version="v2.1", videos=[FRONT], images=[TOP])
    still = [0, 0, 0, 0, 0, 0, 1]
    change_table(
        next(root.glob("data/*/*")), action=lambda rows: [rows[0], *[still] * 3, rows[4], *[still] * 2, rows[7]]
    )
    frames = list(reference(root))
    actions = np.stack([frame["action"] for frame in frames])
    kept = np.flatnonzero(~is_noop(actions))
    assert 2 < len(kept) < 8
    found = samples(root, chunk=3, drop_noops=True, image_history=[-0.1, 0])
    assert [sample.timestep for sample in found] == kept.tolist()
    np.testing.assert_array_equal(
        [sample.action for sample in found], actions[kept[moments(len(kept), np.arange(3)).positions]]
    )
    for sample in found:
        seen = [max(sample.timestep - 1, 0), sample.timestep]
        expected = [frames[t]["images"][key] for key in (FRONT, TOP) for t in seen]
        np.testing.assert_array_equal(sample.images, expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("ranges", "expected"), [([0], {0}), ("1-3", {1, 2, 3}), ([4, "0-1"], {0, 1, 4})])
def test_episodes_are_chosen(tmp_path: Path, version: str, ranges: Any, expected: set[int]) -> None:
    root = write_lerobot(tmp_path / "set", LENGTHS, version=version, videos=())
    dataset = LeRobotDataset(data_config(root, episodes=ranges)).for_split("train")
    assert [count for count, _ in records(dataset, root)] == [LENGTHS[e] for e in sorted(expected)]


def test_train_and_validation_take_different_episodes_of_one_folder(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", LENGTHS, videos=())
    dataset = make_dataset(data_config(root, val=[root], episodes="0-2", val_episodes=[3, 4]))
    lengths = {split: [n for n, _ in records(dataset.for_split(split), root)] for split in ("train", "val")}  # type: ignore[arg-type]
    assert lengths == {"train": [4, 9, 1], "val": [12, 6]}
    with pytest.raises(ConfigError, match="in common"):
        make_dataset(data_config(root, val=[root], episodes="0-3", val_episodes=[3, 4])).for_split("train")
    with pytest.raises(ConfigError, match="in common"):
        make_dataset(data_config(root, val=[root], val_episodes=[3, 4])).for_split("val")


@pytest.mark.parametrize("spelling", ["set/", "./set", "../here/set", "link", "s*t", "."])
def test_a_folder_that_is_spelled_otherwise_is_the_same(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    write_lerobot(here / "set", LENGTHS, videos=())
    (here / "link").symlink_to("set")
    monkeypatch.chdir(here)
    config = replace(data_config(Path("set"), episodes="0-3", val_episodes=[3, 4]), val_data_paths=(spelling,))
    with pytest.raises(ConfigError, match=rf"{here}/set is trained and validated on"):
        make_dataset(config).for_split("train")
    elsewhere = replace(config, val_data_paths=("not/here",))
    assert make_dataset(elsewhere).for_split("val") is not None


def test_the_same_url_with_a_slash_is_the_same(tmp_path: Path) -> None:
    config = replace(
        data_config(Path("unused"), episodes="0-3", val_episodes=[3, 4]),
        train_data_paths=("memory://robots/set",),
        val_data_paths=("memory://robots/set/",),
        cache_dir=str(tmp_path),
    )
    with pytest.raises(ConfigError, match="is trained and validated on"):
        make_dataset(config).for_split("train")
