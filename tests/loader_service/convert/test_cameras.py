"""Several cameras, control modes, and HDF5 files whose groups and arrays have changed places."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.config import DataConfig
from tests.loader_service.convert.makers import (
    Recorded,
    encode,
    example,
    record,
    rlds_features,
    tensor,
    write_maniskill,
    write_rlds,
)
from tests.loader_service.convert.test_formats import run


def read_cameras(jsonl: Path, keys: list[str]) -> list[np.ndarray]:
    """[T, cameras, H, W, 3] of each record."""
    config = DataConfig(
        dataset_type="mani_openpi", train_data_paths=(str(jsonl),), max_seq_len=64, options={"camera_keys": keys}
    )
    dataset = ManiOpenPIDataset(config)
    records = list(dataset.scan(jsonl))
    return [np.stack([np.stack(s.images) for s in dataset.read(jsonl, r.offset, r.size)]) for r in records]


def test_several_maniskill_cameras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, hand = record(3, 0, extra=1), record(3, 1, extra=1)
    path = write_maniskill(tmp_path / "t.h5", [base], [True], cameras=["base", "hand"])
    with h5py.File(path, "r+") as file:
        file["traj_0/obs/sensor_data/hand/rgb"][...] = hand.frames
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1)
    assert (code, "choose with --camera, e.g. base,hand" in said) == (1, True)
    assert run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1, "--camera", "hand,base")[0] == 0
    (found,) = read_cameras(tmp_path / "o/train.jsonl", ["rgb", "rgb_base"])
    np.testing.assert_array_equal(found, np.stack([hand.frames[:3], base.frames[:3]], axis=1))


def test_a_camera_with_fewer_frames_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_maniskill(tmp_path / "t.h5", [record(3, 0, extra=1)], [True], cameras=["base", "hand"])
    with h5py.File(path, "r+") as file:
        frames = file["traj_0/obs/sensor_data/hand/rgb"][:3]
        del file["traj_0/obs/sensor_data/hand/rgb"]
        file["traj_0/obs/sensor_data/hand/rgb"] = frames
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1, "--camera", "base,hand")
    assert (code, "field rgb_hand: 3 frames, and the first camera has 4" in said) == (1, True)


def test_several_rlds_cameras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    front, wrist = record(3, 0), record(3, 1)
    features = {**rlds_features(front), "steps/observation/wrist": [encode(frame, "PNG") for frame in wrist.frames]}
    image = {"pythonClassName": "Image", "image": {"shape": {"dimensions": ["12", "16", "3"]}, "encodingFormat": "png"}}
    observation = {"featuresDict": {"features": {"image": image, "wrist": image}}}
    folder = write_rlds(tmp_path / "d", [[example(features)]], steps={"observation": observation})
    keys = "steps/observation/image,steps/observation/wrist"
    assert run(capsys, "rlds", folder, "--out", tmp_path / "o", "--jobs", 1, "--image-key", keys)[0] == 0
    (found,) = read_cameras(tmp_path / "o/train.jsonl", ["rgb", "rgb_wrist"])
    np.testing.assert_array_equal(found, np.stack([front.frames, wrist.frames], axis=1))


def test_rlds_folders_with_other_actions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episode = record(3, 0)
    a = write_rlds(tmp_path / "a", [[example(rlds_features(episode))]])
    wide = Recorded(episode.frames, np.zeros((3, 8), np.float32), "put")
    b = write_rlds(tmp_path / "b", [[example(rlds_features(wide))]], steps={"action": tensor(8)})
    code, said = run(capsys, "rlds", a, b, "--out", tmp_path / "o", "--jobs", 1)
    assert (code, f"steps/action has 8 numbers, and in {a} it has 7" in said) == (1, True)


@pytest.mark.parametrize("place", ["json", "hdf5"])
def test_two_control_modes_are_refused(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_maniskill(tmp_path / "t.h5", [record(3, i, extra=1) for i in range(3)], [True] * 3)
    file = path.with_suffix(".json")
    tree = json.loads(file.read_text())
    if place == "json":
        tree["episodes"][1]["control_mode"] = "pd_joint_delta_pos"
    else:
        del tree["episodes"][1]["control_mode"]
        with h5py.File(path, "r+") as recorded:
            recorded["traj_1"].attrs["control_mode"] = "pd_joint_delta_pos"
    file.write_text(json.dumps(tree))
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1)
    assert (code, "control modes pd_ee_delta_pose (2), pd_joint_delta_pos (1)" in said) == (1, True)
    arguments = ("maniskill", path, "--out", tmp_path / "o", "--jobs", 1, "--control-mode", "pd_joint_delta_pos")
    assert run(capsys, *arguments)[0] == 0
    (row,) = map(json.loads, (tmp_path / "o/train.jsonl").read_text().splitlines())
    assert (row["source"], row["control_mode"]) == ("t.h5:traj_1", "pd_joint_delta_pos")


PLACES = {
    "traj_1": "field traj_1",
    "traj_1/actions": "field actions: a group: an array is expected",
    "traj_1/obs": "an array: a group is expected",
    "traj_1/obs/sensor_data": "an array: a group is expected",
    "traj_1/obs/sensor_data/base_camera": "no camera with rgb",
    "traj_1/obs/sensor_data/base_camera/rgb": "field rgb: a group: an array is expected",
    "traj_1/obs/agent": "field obs/agent: an array: a group is expected",
    "traj_1/obs/agent/qpos": "a group: an array is expected",
}


@pytest.mark.parametrize("place", PLACES)
def test_groups_and_arrays_in_each_others_place(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one episode: the others are converted."""
    agent = {"qpos": [np.zeros((4, 2), np.float32)] * 3}
    path = write_maniskill(tmp_path / "t.h5", [record(3, i, extra=1) for i in range(3)], [True] * 3, agent=agent)
    with h5py.File(path, "r+") as file:
        was_group = isinstance(file[place], h5py.Group)
        del file[place]
        if was_group:
            file[place] = np.zeros(3, np.float32)
        else:
            file.create_group(place)
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1, "--skip-bad")
    assert code == 0, said
    assert "2 episodes" in said
    assert f"{path}: record traj_1" in said
    expected = "a group is expected" if place == "traj_1" else PLACES[place]
    if place == "traj_1/obs":  # a state vector in the place of observations
        expected = "no images were recorded: "
    assert expected in said


def test_an_array_without_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_maniskill(tmp_path / "t.h5", [record(3, 0, extra=1)], [True])
    with h5py.File(path, "r+") as file:
        del file["traj_0/actions"]
        file["traj_0/actions"] = h5py.Empty("f4")
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1)
    assert (code, "field actions: no values: an array is expected" in said) == (1, True)
