"""What is no error and changes what a training means: the same data on both sides, empty trajectories, frames that are cut."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loader_service.prepare.cameras import camera_findings
from loader_service.prepare.run import prepare
from stoker_proto.config import Config
from stoker_proto.images.geometry import Step, visible_share
from stoker_proto.images.spec import ImageSpec
from tests.loader_service.sources.lerobot.files import change_info, write_lerobot

MakeConfig = Callable[..., Config]
WriteShard = Callable[..., Path]
CLIP: tuple[Step, ...] = (("shortest", 224, 0), ("crop", 224, 224))


def test_the_same_file_for_both_splits(
    make_config: MakeConfig, write_shard: WriteShard, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_shard("a/a.jsonl", [3, 4, 5])
    for _ in range(2):  # scanned, and out of the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            [line] = prepare(make_config(shard, val=[shard])).findings
        assert line.startswith(f"val 0 ({shard}): 3 of its 3 records are train data too ({shard})")
        assert "name other data in data.val_data_paths" in line
        assert line in caplog.text


def test_a_copy_counts_and_other_data_does_not(make_config: MakeConfig, write_shard: WriteShard) -> None:
    train, other = write_shard("a/a.jsonl", [3, 4]), write_shard("b/b.jsonl", [3, 4], seed=1)
    copy = train.parent.parent / "c" / "renamed.jsonl"
    copy.parent.mkdir()
    shutil.copy(train, copy)
    found = prepare(make_config(train, val=[other, copy])).findings
    assert [line.split(",")[0] for line in found] == [
        f"val 1 ({copy}): 2 of its 2 records are train data too ({train})"
    ]
    assert prepare(make_config(train, val=[other])).findings == ()
    assert prepare(make_config(train)).findings == ()


def test_a_text_source_too(tmp_path: Path, make_config: MakeConfig) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_text("".join(json.dumps({"data": ["u", str(i)]}) + "\n" for i in range(5)))
    [line] = prepare(make_config(shard, val=[shard], dataset_type="chat")).findings
    assert "5 of its 5 records are train data too" in line


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_split_of_episodes_is_none(tmp_path: Path, make_config: MakeConfig, version: str) -> None:
    root = write_lerobot(tmp_path / "set", [6, 9, 4, 7], version=version, videos=(), images=())
    split = {"episodes": ["0-1"], "val_episodes": ["2-3"]}
    assert prepare(make_config(root, val=[root], dataset_type="lerobot", options=split)).findings == ()
    [line] = prepare(make_config(root, val=[root], dataset_type="lerobot")).findings
    assert "4 of its 4 records are train data too" in line
    copy = shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns(".stoker"))
    [line] = prepare(make_config(root, val=[copy], dataset_type="lerobot")).findings
    assert "4 of its 4 records are train data too" in line


def test_data_that_two_train_entries_name(make_config: MakeConfig, write_shard: WriteShard) -> None:
    first, second = write_shard("a/a.jsonl", [3, 4]), write_shard("a/b.jsonl", [3, 4, 5], seed=1)
    assert prepare(make_config(first, second)).findings == ()
    [line] = prepare(make_config(first, second.parent / "*.jsonl", second)).findings[:1]
    assert line.startswith(
        f"train 1 ({second.parent}/*.jsonl): 2 of its 5 records are in train 0 too, so each epoch trains"
    )
    assert (
        prepare(make_config(first, second.parent / "*.jsonl", second))
        .findings[1]
        .startswith(f"train 2 ({second}): 3 of its 3 records are in train 1 too")
    )


def test_files_of_several_splits_in_a_folder(make_config: MakeConfig, write_shard: WriteShard) -> None:
    names = ("train_sft-00000-of-00002.jsonl", "train_sft-00001-of-00002.jsonl", "test_sft-00000-of-00001.jsonl")
    shards = [write_shard(f"data/{name}", [3], seed=seed) for seed, name in enumerate(names)]
    folder = shards[0].parent
    [line] = prepare(make_config(folder)).findings
    assert line == (
        f"train 0 ({folder}): by their names its files are of several splits ({names[0]}, {names[2]}), and all of them are "
        f"trained: name those that are meant, e.g. {folder}/*train*"
    )
    assert prepare(make_config(folder / "train*", val=[folder / "test*"])).findings == ()
    plain = [
        write_shard(f"plain/{name}.jsonl", [3], seed=9 + n) for n, name in enumerate(("contest-1", "latest", "train"))
    ]
    assert prepare(make_config(plain[0].parent)).findings == ()


def test_grippers_of_two_conventions(tmp_path: Path, make_config: MakeConfig) -> None:
    def shard(name: str, gripper: list[float]) -> Path:
        path = tmp_path / name / "a.jsonl"
        path.parent.mkdir()
        actions = [[0.1 * t, 0, 0, 0, 0, 0, value] for t, value in enumerate(gripper)]
        path.write_text(json.dumps({"obs_path": "0.npz", "instruction": name, "actions": actions}) + "\n")
        return path

    binary, signed, half = shard("a", [0, 1, 1]), shard("b", [-1, 1, 1]), shard("c", [0.5, 1, 0.75])
    [line] = prepare(make_config(binary, signed, half)).findings
    assert line.startswith(
        f"train 1 ({signed}): dimension 6 of the actions reaches from -1 to 1, and that of train 0 ({binary}) from 0 to 1"
    )
    for paths in ([binary, half], [signed, half], [signed, signed.parent]):
        assert not any("reaches from" in line for line in prepare(make_config(*paths)).findings)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_an_index_that_is_shorter_than_it_says(tmp_path: Path, make_config: MakeConfig, version: str) -> None:
    root = write_lerobot(tmp_path / "set", [6, 9, 4], version=version, videos=(), images=())
    assert prepare(make_config(root, dataset_type="lerobot")).findings == ()
    change_info(root, total_episodes=7)
    [line] = prepare(make_config(root, dataset_type="lerobot")).findings
    assert line.startswith(f"train 0 ({root}): {root}/meta/info.json says total_episodes 7, and meta/ has 3 episodes")
    chosen = {"episodes": ["0-1"]}
    assert prepare(make_config(root, dataset_type="lerobot", options=chosen)).findings == ()


def test_trajectories_that_drop_noops_empties_are_named(tmp_path: Path, make_config: MakeConfig) -> None:
    moving, still = [[0.5] + [0.0] * 6] * 3, [[0.001] + [0.0] * 6] * 3  # metres where units of the controller belong
    rows = [
        {"obs_path": f"{i}.npz", "instruction": "push", "actions": a}
        for i, a in enumerate([moving, still, moving, still])
    ]
    shard = tmp_path / "a.jsonl"
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [line] = prepare(make_config(shard, action={"drop_noops": True})).findings
    assert f"data.action.drop_noops leaves no timestep of 2 of 4 trajectories: {shard}:2, {shard}:4." in line
    assert prepare(make_config(shard)).findings == ()


@pytest.mark.parametrize(
    ("steps", "height", "width", "share"),
    [
        (CLIP, 480, 640, (1.0, 224 / 298)),
        (CLIP, 640, 480, (224 / 298, 1.0)),
        (CLIP, 256, 256, (1.0, 1.0)),
        ((("square", 0, 0), *CLIP), 480, 640, (1.0, 1.0)),
        ((("fixed", 224, 224),), 480, 640, (1.0, 1.0)),
        ((("shortest", 256, 0), ("crop", 224, 224)), 256, 256, (0.875, 0.875)),
        ((("letterbox", 0, 0), ("fixed", 224, 224)), 480, 640, (1.0, 1.0)),
        ((("crop", 240, 320),), 480, 640, (0.5, 0.5)),
    ],
)
def test_the_share_of_a_frame_that_is_seen(
    steps: tuple[Step, ...], height: int, width: int, share: tuple[float, float]
) -> None:
    assert visible_share(steps, height, width) == pytest.approx(share, abs=1e-9)


def spec_of(steps: tuple[Step, ...]) -> ImageSpec:
    return ImageSpec(
        family="llava", height=224, width=224, steps=steps, resample="bicubic", rescale=1 / 255, mean=(0, 0, 0),
        std=(1, 1, 1), num_tokens=256, token="<image>", token_id=9,
    )  # fmt: skip


def test_cut_sides_are_named_once_for_each_size() -> None:
    wide, square = np.zeros((480, 640, 3), np.uint8), np.zeros((256, 256, 3), np.uint8)
    [line] = camera_findings([wide, square, wide], spec_of(CLIP))
    assert line.startswith("the model's processor cuts 25% off frames of 640x480, at left and right")
    assert "data.image.pad_to_square" in line
    assert camera_findings([wide, square], spec_of((("square", 0, 0), *CLIP))) == []
    assert camera_findings([wide], None) == []
