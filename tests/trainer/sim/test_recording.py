"""The writer: what is read back is what was written, the same data is the same bytes, nothing is half-written."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.errors import ConfigError, DataError
from trainer.sim import recording
from trainer.sim.recording import Recorder, Trajectory, read_npz


def trajectory(seed: int, steps: int = 3) -> Trajectory:
    random = np.random.default_rng(seed)
    return Trajectory(
        task="PushCube-v1",
        instruction="push the blue cube forward onto the red and white target",
        seed=seed,
        actions=random.uniform(-1, 1, (steps, 7)).round(6),
        observations={
            "rgb": random.integers(0, 256, (steps, 4, 4, 3), dtype=np.uint8),
            "depth": random.integers(0, 9000, (steps, 4, 4), dtype=np.uint16),
            "qpos": random.normal(size=(steps, 9)).astype(np.float32),
        },
    )


@pytest.mark.parametrize("compression", ["deflated", "stored"])
def test_what_is_read_is_what_was_written(tmp_path: Path, compression: str) -> None:
    written = [trajectory(5), trajectory(9, steps=1)]
    with Recorder(tmp_path, "val", compression) as recorder:
        for each in written:
            recorder.write(each)
    rows = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["obs_path", "task", "instruction", "actions", "seed"]] * 2
    assert [row["obs_path"] for row in rows] == ["val/traj_000000/obs.npz", "val/traj_000001/obs.npz"]
    for row, each in zip(rows, written, strict=True):
        assert (row["task"], row["instruction"], row["seed"]) == (each.task, each.instruction, each.seed)
        np.testing.assert_array_equal(row["actions"], each.actions)
        members = read_npz(tmp_path / row["obs_path"])
        assert list(members) == list(each.observations)
        for name, array in each.observations.items():
            np.testing.assert_array_equal(members[name], array)
            assert members[name].dtype == array.dtype
        with zipfile.ZipFile(tmp_path / row["obs_path"]) as archive:
            assert {info.compress_type for info in archive.infolist()} == {recording.COMPRESSIONS[compression]}


def test_bytes_are_pinned(tmp_path: Path) -> None:
    # A round trip would pass with a timestamp inside; these bytes would not.
    counted = Trajectory(
        task="PickCube-v1",
        instruction="pick",
        seed=5,
        actions=np.arange(14).reshape(2, 7) / 16,
        observations={"rgb": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)},
    )
    with Recorder(tmp_path, "train", "stored") as recorder:
        recorder.write(counted)
    assert (tmp_path / "train.jsonl").read_text() == (
        '{"obs_path": "train/traj_000000/obs.npz", "task": "PickCube-v1", "instruction": "pick", "actions": '
        "[[0.0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375], [0.4375, 0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125]], "
        '"seed": 5}\n'
    )
    npz = (tmp_path / "train" / "traj_000000" / "obs.npz").read_bytes()
    assert hashlib.sha256(npz).hexdigest() == "64d80c75e28b9511b9d897d699b6d5fe6da9a129f7a4a87d5d2a4b05ecb6e62d"


def test_parts_of_unequal_length_are_refused() -> None:
    good = trajectory(0)
    with pytest.raises(DataError, match=r"T differs .* seed 0: .*'rgb': 3.*'actions': 2"):
        Trajectory(task=good.task, instruction="", seed=0, actions=good.actions[:2], observations=good.observations)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with Recorder(tmp_path, "train") as recorder:
        recorder.write(trajectory(0))
    before = (tmp_path / "train.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"train\.jsonl exists and is not overwritten"):
        Recorder(tmp_path, "train")
    assert (tmp_path / "train.jsonl").read_bytes() == before


@pytest.mark.parametrize("num_complete", [0, 2])
@pytest.mark.parametrize(
    "point", ["in the NPZ", "before the rename", "before the line", "in the line", "after the line"]
)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_interrupted_anywhere_leaves_whole_trajectories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_complete: int, point: str, kind: type[BaseException]
) -> None:
    def run() -> None:
        with Recorder(tmp_path, "train") as recorder:
            for seed in range(num_complete):
                recorder.write(trajectory(seed))
            _interrupt(monkeypatch, point, kind)
            recorder.write(trajectory(99))

    with pytest.raises(kind, match="stopped here"):
        run()
    monkeypatch.undo()
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    if num_complete == 0:
        assert files == []
        return
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    folders = [f"train/traj_{index:06d}" for index in range(2)]
    assert files == sorted(["train", "train.jsonl", *folders, *(f"{folder}/obs.npz" for folder in folders)])


def _interrupt(monkeypatch: pytest.MonkeyPatch, point: str, kind: type[BaseException]) -> None:
    """Makes the next write raise `kind` at `point`."""

    def stop(*_: object, **__: object) -> None:
        raise kind("stopped here")

    real_open = Path.open

    def open_and_stop(path: Path, *arguments: str) -> None:
        with real_open(path, *arguments) as file:
            file.write(b'{"obs_path": "tr' if point == "in the line" else b'{"whole": "line"}\n')
        stop()

    if point == "in the NPZ":
        monkeypatch.setattr(recording.np.lib.format, "write_array", stop)
    elif point == "before the rename":
        monkeypatch.setattr(Path, "rename", stop)
    elif point == "before the line":
        monkeypatch.setattr(recording.json, "dumps", stop)
    else:
        monkeypatch.setattr(Path, "open", open_and_stop)
