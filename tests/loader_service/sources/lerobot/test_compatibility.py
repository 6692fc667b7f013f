"""`lerobot`: data sets that are read together mean the same by an image and by a number; depth is no colour."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

from loader_service.sources.lerobot.dataset import LeRobotDataset
from stoker_proto.config import ActionConfig, DataConfig
from stoker_proto.errors import DataError
from tests.loader_service.sources.lerobot.checks import FRONT, TOP, WRIST, data_config, refusal, samples
from tests.loader_service.sources.lerobot.files import change_info, write_lerobot

SHARED = Path(os.environ.get("STOKER_SHARED_DATA", Path(__file__).parents[5] / "shared" / "data"))
BLUE = {FRONT: 0, WRIST: 90}
"""Of the background of each camera's frames."""


def two(root: Path, first: list[str], second: list[str], **keys: Any) -> Path:
    write_lerobot(root / "a", [3], videos=[], images=first)
    write_lerobot(root / "b", [3], videos=[], images=second, **keys)
    return root


def set_feature(root: Path, key: str, **changes: Any) -> None:
    change_info(root, features=lambda tree: {**tree, key: {**tree[key], **changes}})


def test_cameras_in_another_order_are_refused_and_matched_by_name(tmp_path: Path) -> None:
    root = two(tmp_path, [FRONT, WRIST], [WRIST, FRONT])
    assert refusal(root) == (
        f"{root}/b/meta/info.json: field features: cameras {WRIST}, {FRONT}, and {root}/a/meta/info.json has {FRONT}, {WRIST}: "
        f"name those to read in data.options.image_keys, e.g. [{FRONT}, {WRIST}]; both are trained together"
    )
    blue = [[int(image[-1, -1, 2]) for image in s.images] for s in samples(root, image_keys=[WRIST, FRONT])]
    assert blue == [[90, 0]] * 3 + [[0, 90]] * 3  # the writer gives the first named camera 0


def test_one_camera_beside_two_is_refused(tmp_path: Path) -> None:
    root = two(tmp_path, [FRONT, WRIST], [FRONT])
    assert f"cameras {FRONT}, and {root}/a/meta/info.json has {FRONT}, {WRIST}" in refusal(root)
    assert len(samples(root, image_keys=[FRONT])) == 6


NAMES: dict[str, tuple[Any, Any]] = {
    "list": (["x", "y", "z", "a", "b", "c", "gripper"], ["y", "x", "z", "a", "b", "c", "gripper"]),
    "motors": ({"motors": list("xyzabcg")}, {"motors": list("yxzabcg")}),
    "places": ({name: i for i, name in enumerate("xyzabcg")}, {name: i for i, name in enumerate("yxzabcg")}),
}


@pytest.mark.parametrize("form", NAMES)
def test_actions_with_names_in_another_order_are_refused(tmp_path: Path, form: str) -> None:
    root = two(tmp_path, [FRONT], [FRONT])
    names, others = NAMES[form]
    set_feature(root / "a", "action", names=names)
    assert len(samples(root)) == 6  # b has no names
    set_feature(root / "b", "action", names=names)
    assert len(samples(root)) == 6
    set_feature(root / "b", "action", names=others)
    assert f"field features[action].names[0]: y, and {root}/a/meta/info.json has x there" in refusal(root)


def test_another_number_of_actions_or_states_is_refused(tmp_path: Path) -> None:
    root = two(tmp_path, [FRONT], [FRONT], dim=8, state_dim=6)
    assert f"field features[action]: shape [8], and {root}/a/meta/info.json has [7]" in refusal(root)
    assert len(samples(root, action_key="timestamp", state="none")) == 6  # states are not asked for


def test_another_rate_is_refused_where_chunks_take_another_time(tmp_path: Path) -> None:
    root = two(tmp_path, [FRONT], [FRONT], fps=5)
    assert len(samples(root)) == 6
    assert f"field fps: 5, and {root}/a/meta/info.json has 10: 4 actions take another time" in refusal(root, chunk=4)
    assert len(samples(root, chunk=2, action_delta_timestamps=[0, 0.2])) == 6


def test_other_entries_and_splits_are_compared_too(tmp_path: Path) -> None:
    root = two(tmp_path, [FRONT, WRIST], [WRIST, FRONT])
    dataset = LeRobotDataset(data_config(root / "a", root / "b"))
    dataset.locate(str(root / "a"))
    with pytest.raises(DataError, match=r"^.*/b/meta/info.json: field features: cameras"):
        dataset.locate(str(root / "b"))
    dataset = LeRobotDataset(data_config(root / "a", val=[root / "b"]))
    dataset.for_split("train").locate(str(root / "a"))
    with pytest.raises(DataError, match=r"^.*/b/meta/info.json: field features: cameras"):
        dataset.for_split("val").locate(str(root / "b"))


def test_states_are_compared_where_they_are_read(tmp_path: Path) -> None:
    root = two(tmp_path, [FRONT], [FRONT], state_dim=6)
    config = DataConfig(
        dataset_type="lerobot", train_data_paths=(str(root),), max_seq_len=64, state="text", action=ActionConfig()
    )
    with pytest.raises(DataError, match=r"field features\[observation.state\]: shape \[6\], and .*/a/.* has \[5\]"):
        LeRobotDataset(config).locate(str(root))


DEPTH = [
    {"info": {"video.is_depth_map": True}},
    {"info": {"is_depth_map": True}},
    {"video_info": {"video.is_depth_map": True}},
    {"video_info": {"is_depth_map": True}},
    {"info": {"video": {"is_depth_map": True}}},
]


@pytest.mark.parametrize("mark", DEPTH)
@pytest.mark.parametrize("kind", ["videos", "images"])
def test_depth_is_not_read_as_colours(tmp_path: Path, mark: dict[str, Any], kind: str) -> None:
    cameras = {"videos": [FRONT, TOP], "images": []} if kind == "videos" else {"videos": [], "images": [FRONT, TOP]}
    root = write_lerobot(tmp_path / "set", [3], **cameras)
    false = {place: dict.fromkeys(marks, False) for place, marks in mark.items()}
    set_feature(root, TOP, **false)
    assert len(samples(root)) == 3
    set_feature(root, TOP, **mark)
    assert f"field features[{TOP}]: a depth camera (is_depth_map)" in refusal(root)
    assert len(samples(root, image_keys=[FRONT])) == 3


def test_the_cases_of_the_shared_data() -> None:
    folder = SHARED / "cases"
    if not folder.is_dir():
        pytest.skip(f"NOT TESTED: {folder} is not there; set STOKER_SHARED_DATA to the folder that holds cases/")
    assert f"cameras {WRIST}, {FRONT}, and " in refusal(folder / "cameras_*")
    assert samples(folder / "cameras_*", image_keys=[FRONT])
