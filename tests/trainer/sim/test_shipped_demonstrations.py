"""The demonstrations that the repository carries: well-formed, successful, validation held out. Needs no simulator."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trainer.sim.recording import read_npz

FOLDER = Path(__file__).resolve().parents[2] / "data" / "maniskill"
SPLITS = ("train", "val")
MAX_SIZE_BYTES = 7_500_000

Row = dict[str, Any]


def rows(split: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


ALL = [pytest.param(row, id=row["obs_path"]) for split in SPLITS for row in rows(split)]


@pytest.mark.long
@pytest.mark.parametrize("row", ALL)
def test_row_and_npz_agree(row: Row) -> None:
    assert list(row) == ["obs_path", "task", "instruction", "actions", "seed"]
    actions = np.array(row["actions"])
    steps = len(actions)
    assert 5 <= steps < 50
    assert actions.shape == (steps, 7)
    assert np.abs(actions).max() <= 1
    assert set(actions[:, 6]) <= {-1.0, 1.0}
    np.testing.assert_array_equal(actions, actions.round(6))
    members = read_npz(FOLDER / row["obs_path"])
    assert {name: (array.dtype.name, array.shape) for name, array in members.items()} == {
        "rgb": ("uint8", (steps, 96, 96, 3)),
        "depth": ("uint16", (steps, 96, 96)),
        "qpos": ("float32", (steps, 9)),
        "tcp_pose": ("float32", (steps, 7)),
    }
    assert members["rgb"].std(axis=(1, 2, 3)).min() > 20, "a blank image"
    assert (np.diff(members["rgb"].astype(int), axis=0) != 0).any(axis=(1, 2, 3)).all(), "an image that repeats"
    assert members["depth"].min() > 200
    assert members["depth"].max() < 10_000
    np.testing.assert_allclose(np.linalg.norm(members["tcp_pose"][:, 3:], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("row", ALL)
def test_trajectory_ends_in_success(row: Row) -> None:
    """By what the arm did: the simulator's own verdict is checked by the replay in test_collect_in_simulator.py."""
    members = read_npz(FOLDER / row["obs_path"])
    tcp: npt.NDArray[np.float32] = members["tcp_pose"][:, :3]  # [T, 3], metres
    fingers: npt.NDArray[np.float32] = members["qpos"][:, 7:]  # [T, 2], metres
    if row["task"] == "PushCube-v1":
        assert tcp[-1, 0] - tcp[:, 0].min() > 0.08, "pushed forward by less than to the disc's edge"
        assert tcp[-1, 2] < 0.03
    elif row["task"] == "PullCube-v1":
        assert tcp[:, 0].max() - tcp[-1, 0] > 0.08, "pulled back by less than to the disc's edge"
        assert tcp[-1, 2] < 0.03
    else:
        # Together about 40 mm, a cube (its sides give way a little): they hold it, are not shut. Just before a
        # StackCube ends they open again.
        np.testing.assert_allclose(fingers[-1 if row["task"] == "PickCube-v1" else -3], 0.0195, atol=0.0015)
    if row["task"] == "PickCube-v1":
        assert np.linalg.norm(tcp[-1] - _goal(row["instruction"])) < 0.035
    if row["task"] == "StackCube-v1":
        assert row["actions"][-1][6] == 1, "has not let go"
        assert row["actions"][-4][6] == -1, "let go too early"
        assert tcp[-1, 2] == pytest.approx(0.0625, abs=0.008)


def test_both_splits_have_every_task_and_fit_in_the_repository() -> None:
    for split, least in (("train", 55), ("val", 12)):
        tasks = [row["task"] for row in rows(split)]
        assert set(tasks) == {"PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1"}
        assert len(tasks) >= least
    files = {path for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files) <= MAX_SIZE_BYTES
    named = {FOLDER / row["obs_path"] for split in SPLITS for row in rows(split)}
    assert files == named | {FOLDER / "train.jsonl", FOLDER / "val.jsonl", FOLDER / "README.md"}


def test_validation_seeds_are_held_out() -> None:
    seeds = {split: {row["seed"] for row in rows(split)} for split in SPLITS}
    assert not seeds["train"] & seeds["val"]


def test_readme_has_a_literal_row_and_the_true_numbers() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert (FOLDER / "val.jsonl").read_text().splitlines()[0] in readme
    for split in SPLITS:
        steps = sum(len(row["actions"]) for row in rows(split))
        assert f"| `{split}.jsonl` | {len(rows(split))} | {steps} |" in readme


def _goal(instruction: str) -> npt.NDArray[np.float64]:
    """Metres, from "... hold it at 3 cm forward, 10 cm right, 29 cm up"."""
    match = re.search(r"(\d+) cm (forward|back), (\d+) cm (left|right), (\d+) cm up$", instruction)
    assert match, instruction
    x, along, y, sideways, z = match.groups()
    return (
        np.array([int(x) * (1 if along == "forward" else -1), int(y) * (1 if sideways == "left" else -1), int(z)]) / 100
    )
