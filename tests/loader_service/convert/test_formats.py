"""Each format, converted by the command and read back by the dataset: the same frames, actions and instructions."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.lib import format as npy_format

from loader_service.cli import convert as command
from tests.loader_service.convert.makers import (
    Recorded,
    assert_same,
    encode,
    example,
    feature,
    message,
    read_all,
    record,
    rlds_features,
    tensor,
    write_maniskill,
    write_rl4vla,
    write_rlds,
)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and what was said."""
    code = command([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_rl4vla(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = [record(5, 0), record(3, 1), record(4, 2, extra=1)]
    write_rl4vla(tmp_path / "in" / "episode_2.npz", episodes[0])
    write_rl4vla(tmp_path / "in" / "episode_10.npz", episodes[1], images=list(episodes[1].frames))
    write_rl4vla(
        tmp_path / "in" / "z.npy", episodes[2], action=episodes[2].actions, instruction=[episodes[2].instruction] * 2
    )
    out = tmp_path / "out"
    code, said = run(capsys, "rl4vla", tmp_path / "in", "--out", out, "--task", "Plate-v3", "--jobs", 1)
    assert code == 1
    assert "reading a pickle can run code that it contains" in said
    assert not out.exists()
    code, said = run(
        capsys, "rl4vla", tmp_path / "in", "--out", out, "--task", "Plate-v3", "--jobs", 1, "--trust-pickle"
    )
    assert (code, said) == (
        0,
        f"{out / 'train.jsonl'}: 3 episodes (3 of them new), 12 actions; every episode was read back and counted\n",
    )
    for found, expected in zip(read_all(out / "train.jsonl"), episodes, strict=True):
        assert_same(found, expected)
    row = json.loads((out / "train.jsonl").read_text().splitlines()[1])
    assert (row["obs_path"], row["task"], row["source"]) == (
        "traj_000001/obs.npz",
        "Plate-v3",
        "episode_10.npz:episode_10",
    )


@pytest.mark.parametrize("swapped", [True, False])
def test_rl4vla_encoded_images(swapped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenCV takes the collector's RGB for BGR: what is red was stored as blue."""
    red = np.zeros((3, 16, 16, 3), np.uint8)
    red[..., 0] = 250
    episode = Recorded(red, record(3, 1).actions, "push")
    stored = red[..., ::-1] if swapped else red
    images = [np.frombuffer(encode(np.ascontiguousarray(frame), "JPEG"), np.uint8) for frame in stored]
    write_rl4vla(tmp_path / "e.npz", episode, images=images, is_image_encode=True)
    options = () if swapped else ("--encoded-rgb",)
    code, _ = run(
        capsys, "rl4vla", tmp_path / "e.npz", "--out", tmp_path / "out", "--jobs", 1, "--trust-pickle", *options
    )
    assert code == 0
    frame = read_all(tmp_path / "out" / "train.jsonl")[0][0].images[0]
    assert frame[8, 8, 0] > 240
    assert frame[8, 8, 2] < 10


def test_rl4vla_files_of_an_older_numpy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """numpy 1 calls its parts numpy.core; its np.save pickles with protocol 3."""
    episode = record(3, 4)
    tree = {"image": list(episode.frames), "action": episode.actions, "instruction": episode.instruction}
    body = pickle.dumps(np.array(tree, dtype=object), protocol=3).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in body
    with (tmp_path / "e.npy").open("wb") as file:
        npy_format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(body)
    code, said = run(capsys, "rl4vla", tmp_path / "e.npy", "--out", tmp_path / "out", "--jobs", 1, "--trust-pickle")
    assert code == 0, said
    assert_same(read_all(tmp_path / "out" / "train.jsonl")[0], episode)


class _Command:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


def test_a_hostile_pickle_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rl4vla(tmp_path / "e.npz", record(2, 0), info=[_Command()])
    code, said = run(capsys, "rl4vla", tmp_path / "e.npz", "--out", tmp_path / "out", "--jobs", 1, "--trust-pickle")
    assert code == 1
    assert "e.npz: field arr_0" not in said
    assert "e.npz: the pickle names posix.system: only numpy arrays and PIL images are unpickled" in said
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("keys", "message_"),
    [
        (
            {"action": [[0.0] * 7, [0.0] * 6]},
            "record e, field action: actions that are not lists of numbers of one length",
        ),
        ({"action": [[0.0] * 7]}, "record e, field actions: 3 frames and 1 actions: as many frames, or one more"),
        ({"action": [[0.0] * 7, [np.inf] * 7]}, r"record e, field actions\[1\]\[0\]: inf is not a finite"),
        ({"image": []}, "record e, field image: list: a list of images is expected"),
        ({"image": [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]}, r"field image\[1\]: shape"),
        ({"image": [b"x", b"y"]}, r"field image\[0\]: an image that cannot be decoded"),
        ({"image": [np.zeros((4, 4)), np.zeros((4, 4))]}, r"field image\[0\]: float64 \[4, 4\]: uint8 \[H, W, 3\]"),
        ({"instruction": " "}, "field instruction: an empty instruction"),
        ({"instruction": 3}, "field instruction: 3: a text is expected"),
    ],
)
def test_wrong_pickled_episodes(
    keys: dict[str, Any], message_: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rl4vla(tmp_path / "e.npz", record(3, 0), **keys)
    code, said = run(capsys, "rl4vla", tmp_path / "e.npz", "--out", tmp_path / "out", "--jobs", 1, "--trust-pickle")
    assert code == 1
    assert re.search(message_, said), said
    assert str(tmp_path / "e.npz") in said
    assert list((tmp_path / "out").glob("*traj*")) == []


def test_bad_episodes_are_named_where_they_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rl4vla(tmp_path / "in" / "a.npz", record(3, 0))
    write_rl4vla(tmp_path / "in" / "b.npz", record(3, 0), instruction="")
    common = ("rl4vla", tmp_path / "in", "--out", tmp_path / "out", "--jobs", 1, "--trust-pickle")
    assert run(capsys, *common)[0] == 1
    code, said = run(capsys, *common, "--skip-bad")
    assert code == 0
    assert "1 episodes (0 of them new)" in said
    assert "1 bad episodes were left out:\n" in said
    assert f"{tmp_path / 'in' / 'b.npz'}: record b, field instruction: an empty instruction" in said


def test_maniskill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = [record(length, seed, extra=1) for seed, length in enumerate((4, 6, 3))]
    path = write_maniskill(tmp_path / "PushCube" / "trajectory.h5", episodes, [True, False, True])
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "all", "--depth", "--jobs", 1)
    assert (code, "3 episodes" in said, "13 actions" in said) == (0, True, True)
    for found, expected in zip(read_all(tmp_path / "all" / "train.jsonl", depth=True), episodes, strict=True):
        assert_same(found, expected, "push the cube to the goal")
        np.testing.assert_array_equal(found[1].images[1], expected.frames[1, ..., 0].astype(np.uint16) * 7)
    code, _ = run(capsys, "maniskill", tmp_path / "PushCube", "--out", tmp_path / "good", "--only-success", "--jobs", 1)
    assert code == 0
    good = read_all(tmp_path / "good" / "train.jsonl")
    assert [len(samples) for samples in good] == [4, 3]
    assert (
        json.loads((tmp_path / "good" / "train.jsonl").read_text().splitlines()[1])["source"] == "trajectory.h5:traj_2"
    )


def test_what_failed_is_said_in_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that loader-prepare counts it."""

    def said_of(*arguments: object) -> list[Any]:
        code, said = run(capsys, *arguments, "--out", tmp_path / "out", "--jobs", 1)
        assert code == 0, said
        return [
            json.loads(line).get("success", "-") for line in (tmp_path / "out/train.jsonl").read_text().splitlines()
        ]

    episodes = [record(3, seed, extra=1) for seed in range(4)]
    path = write_maniskill(tmp_path / "t.h5", episodes, [True, False, True, 0])
    tree: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    del tree["episodes"][2]["success"]
    path.with_suffix(".json").write_text(json.dumps(tree))
    assert said_of("maniskill", path) == [True, False, "-", False]
    steps = [
        [{"success": np.bool_(False)}, {"success": np.array([True])}, {}],
        [{"success": np.bool_(False)}, {}, {}],
        [{"reward": 1.0}] * 3,
    ]
    for number, infos in enumerate(steps):
        write_rl4vla(tmp_path / "in" / f"e{number}.npz", record(3, 0), info=infos)
    shutil.rmtree(tmp_path / "out")
    assert said_of("rl4vla", tmp_path / "in", "--trust-pickle") == [True, False, "-"]


def test_maniskill_cameras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_maniskill(tmp_path / "t.h5", [record(2, 0, extra=1)], [True], cameras=["hand", "base"])
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1)
    assert (code, "there are the cameras base, hand: choose with --camera, e.g. base,hand" in said) == (1, True)
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1, "--camera", "left")
    assert (code, "--camera left: there are base, hand" in said) == (1, True)
    assert run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1, "--camera", "hand")[0] == 0


def test_maniskill_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Joint positions wherever they were recorded, velocities where asked for; exact through the text of the row."""
    episodes = [record(length, seed, extra=1) for seed, length in enumerate((4, 3))]
    random = np.random.default_rng(5)
    agent = {name: [random.normal(size=(len(one.frames), 9)) for one in episodes] for name in ("qpos", "qvel")}
    path = write_maniskill(tmp_path / "t.h5", episodes, [True, True], agent=agent)
    for flags, names in (((), ["qpos"]), (("--qvel",), ["qpos", "qvel"])):
        out = tmp_path / "-".join(names)
        code, said = run(capsys, "maniskill", path, "--out", out, "--jobs", 1, *flags)
        assert code == 0, said
        for number, found in enumerate(read_all(out / "train.jsonl", state="text")):
            assert_same(found, episodes[number], "push the cube to the goal")
            expected = np.concatenate([agent[name][number] for name in names], axis=1).astype(np.float32)
            states = np.stack([sample.state for sample in found if sample.state is not None])
            assert states.tobytes() == expected[:-1].tobytes()
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "qpos", "--jobs", 1, "--qvel")
    assert (code, "or with other options: name another folder" in said) == (1, True)


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ({"qpos": np.zeros((3, 9)), "qvel": np.zeros((2, 9))}, "3 positions and 2 velocities"),
        ({"qpos": np.zeros((3, 9))}, "field qvel: there is no qvel; there are qpos"),
        ({}, "field qpos: there is no qpos; there are none"),
        ({"qpos": np.full((3, 9), np.nan), "qvel": np.zeros((3, 9))}, "field states[0][0]: nan is not a finite"),
        ({"qpos": np.zeros((5, 9)), "qvel": np.zeros((5, 9))}, "field states: shape [5, 18] and 2 actions: [T, S]"),
        ({"qpos": np.zeros(3), "qvel": np.zeros((3, 9))}, "field qpos: float64 [3]: floating with 2 dimensions"),
    ],
)
def test_wrong_maniskill_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], agent: dict[str, np.ndarray], said: str
) -> None:
    one = record(2, 0, extra=1)
    path = write_maniskill(tmp_path / "t.h5", [one], [True], agent={name: [value] for name, value in agent.items()})
    code, found = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1, "--qvel")
    assert (code, said in found) == (1, True), found
    assert f"{path}: record traj_0" in found


def test_wrong_maniskill_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_maniskill(tmp_path / "t.h5", [record(2, 0, extra=1)], [True], off_by=1)
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1)
    assert code == 1
    assert f"{path}: record traj_0, field actions: 2 actions, and elapsed_steps in t.json is 3" in said
    path.with_suffix(".json").unlink()
    assert "t.json: it cannot be read" in run(capsys, "maniskill", path, "--out", tmp_path / "p", "--jobs", 1)[1]
    path.write_bytes(b"not HDF5")
    path.with_suffix(".json").write_text('{"env_info": {}, "episodes": [{"episode_id": 0, "elapsed_steps": 2}]}')
    assert "t.h5: HDF5 that cannot be read" in run(capsys, "maniskill", path, "--out", tmp_path / "p", "--jobs", 1)[1]


def test_rlds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = [record(length, seed) for seed, length in enumerate((4, 6, 3, 5))]
    records = [example(rlds_features(episode)) for episode in episodes]
    folder = write_rlds(tmp_path / "bridge" / "1.0.0", [records[:3], records[3:]])
    code, said = run(capsys, "rlds", folder, "--out", tmp_path / "out", "--jobs", 1)
    assert (code, "4 episodes" in said, "18 actions" in said) == (0, True, True), said
    for found, expected in zip(read_all(tmp_path / "out" / "train.jsonl"), episodes, strict=True):
        assert_same(found, expected)
    rows = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert json.loads(rows[3])["source"] == "tiny-train.tfrecord-00001-of-00002:record 0"


def test_rlds_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episode, random = record(4, 3), np.random.default_rng(6)
    pose, grip = random.normal(size=(4, 7)).astype(np.float32), random.normal(size=(4, 1)).astype(np.float32)
    features = {**rlds_features(episode), "steps/observation/state": pose.reshape(-1), "steps/grip": grip.reshape(-1)}
    folder = write_rlds(tmp_path / "d", [[example(features)]])
    tree = json.loads((folder / "features.json").read_text())
    steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["observation"]["featuresDict"]["features"]["state"] = tensor(7)
    steps["grip"] = tensor()
    (folder / "features.json").write_text(json.dumps(tree))
    keys = "steps/observation/state,steps/grip"
    code, said = run(capsys, "rlds", folder, "--out", tmp_path / "out", "--jobs", 1, "--state-key", keys)
    assert code == 0, said
    (found,) = read_all(tmp_path / "out" / "train.jsonl", state="text")
    assert_same(found, episode)
    states = np.stack([sample.state for sample in found if sample.state is not None])
    assert states.tobytes() == np.concatenate([pose, grip], axis=1).tobytes()
    assert run(capsys, "rlds", folder, "--out", tmp_path / "none", "--jobs", 1)[0] == 0
    assert "states" not in json.loads((tmp_path / "none" / "train.jsonl").read_text())
    code, said = run(capsys, "rlds", folder, "--out", tmp_path / "no", "--jobs", 1, "--state-key", "steps/joints")
    assert (code, "features.json: there is no steps/joints; there are" in said) == (1, True)


def test_rlds_actions_without_a_fixed_shape_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_rlds(tmp_path / "d", [[example(rlds_features(record(4, 3)))]])
    tree = json.loads((folder / "features.json").read_text())
    steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["action"] = tensor(-1)
    (folder / "features.json").write_text(json.dumps(tree))
    code, said = run(capsys, "rlds", folder, "--out", tmp_path / "out", "--jobs", 1)
    assert (code, "features.json: steps/action has a dimension of -1" in said) == (1, True), said


@pytest.mark.parametrize("obs", ["none", "state"])
def test_maniskill_without_images_says_how_to_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], obs: str
) -> None:
    path = write_maniskill(tmp_path / "t.h5", [record(2, 0, extra=1)], [True])
    with h5py.File(path, "r+") as file:
        del file["traj_0/obs"]
        if obs == "state":  # obs_mode state: one vector in the place of the group
            file["traj_0/obs"] = np.zeros((3, 5), np.float32)
    code, said = run(capsys, "maniskill", path, "--out", tmp_path / "o", "--jobs", 1)
    assert (code, "no images were recorded: replay the demonstrations with obs_mode rgb" in said) == (1, True), said


def test_rlds_with_other_keys_and_as_a_sequence_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Actions in two parts, one of them whole numbers; steps as FeatureLists; no instruction."""
    episode = record(3, 7)
    actions = np.concatenate([episode.actions[:, :6], np.array([[-1], [1], [0]], np.float32)], axis=1)
    lists = {
        "cam": [[encode(frame, "PNG")] for frame in episode.frames],
        "move": list(actions[:, :6]),
        "grip": [[int(value)] for value in actions[:, 6]],
    }
    entries = [
        message(1, message(1, name.encode()) + message(2, b"".join(message(1, feature(step)) for step in steps)))
        for name, steps in lists.items()
    ]
    sequence = message(1, b"") + message(2, b"".join(entries))
    folder = write_rlds(tmp_path / "d", [[sequence]])
    described = {"cam": {"image": {}}, "move": tensor(2, 3), "grip": tensor()}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": described}}))
    keys = ("--image-key", "cam", "--action-key", "move,grip", "--instruction-key", "", "--task", "PushCube-v1")
    code, said = run(capsys, "rlds", folder, "--out", tmp_path / "out", "--jobs", 1, *keys)
    assert code == 0, said
    expected = Recorded(episode.frames, actions, "")
    assert_same(read_all(tmp_path / "out" / "train.jsonl")[0], expected, "push the cube to the goal")


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_wrong_rlds_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = rlds_features(record(3, 1))
    cases: dict[str, tuple[list[dict[str, Any]], tuple[object, ...], str]] = {
        "short": ([{**good, "steps/action": np.zeros(20)}], (), "field steps/action: 20 numbers for 3 steps: 7 each"),
        "image": (
            [good, {**good, "steps/observation/image": [b"\xff\xd8x"] * 3}],
            (),
            r"record 1, field steps/observation/image[0]: an image that cannot be decoded",
        ),
        "words": (
            [{**good, "steps/language_instruction": [b"a", b"b", b"a"]}],
            (),
            "2 different instructions in one episode ('a', 'b')",
        ),
        "kind": (
            [{**good, "steps/action": [b"x"]}],
            (),
            "field steps/action: it holds bytes, not floats or whole numbers",
        ),
        "key": (
            [good],
            ("--image-key", "steps/wrist"),
            "there is no steps/wrist; there are episode_metadata/file_path, steps",
        ),
        "split": ([good], ("--split", "val"), "no file NAME-val.tfrecord-00000-of-00000; there are the splits train"),
    }
    for name, (features, options, expected) in cases.items():
        folder = write_rlds(tmp_path / name, [[example(one) for one in features]])
        code, said = run(capsys, "rlds", folder, "--out", tmp_path / "o" / name, "--jobs", 1, *options)
        assert code == 1, name
        assert expected in said, (name, said)
        assert str(folder) in said
    folder = write_rlds(tmp_path / "count", [[example(good)]], lengths=["2"])
    said = run(capsys, "rlds", folder, "--out", tmp_path / "o" / "c", "--jobs", 1)[1]
    assert "00000-of-00001: 1 records, and dataset_info.json promises 2: copy it again" in said


def test_damaged_tfrecord_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = example(rlds_features(record(3, 1)))
    for name, change, expected in (
        ("body", lambda data: damaged(data, 100), "record at byte 0: the checksum of a record is wrong"),
        ("length", lambda data: damaged(data, 1), "record at byte 0: the checksum of a record's length is wrong"),
        ("cut", lambda data: data[:-1], "record at byte 0: it ends in the middle of a record"),
        ("head", lambda data: data + b"abc", "it ends in the middle of a record's header"),
        ("other", lambda data: b"\x1f\x8b" + data, "it is no TFRecord file, or damaged (compressed ones are not read)"),
    ):
        folder = write_rlds(tmp_path / name, [[content]])
        file = folder / "tiny-train.tfrecord-00000-of-00001"
        file.write_bytes(change(file.read_bytes()))
        code, said = run(capsys, "rlds", folder, "--out", tmp_path / "o" / name, "--jobs", 1)
        assert (code, expected in said) == (1, True), said
        assert str(file) in said
