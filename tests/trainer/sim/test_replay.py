"""The gates before a training, in the small pushing world: what passes, and what a failure says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stoker_proto.actions import StatisticsAccumulator, fit_codec
from stoker_proto.errors import DataError
from stoker_proto.processor import Processor
from tests.trainer.sim.pushing import Pushing, Reader
from tests.trainer.support.memory import make_config
from trainer.policy_io import PolicyInput
from trainer.sim.replay.command import main
from trainer.sim.replay.recordings import read_recordings
from trainer.sim.replay.round_trip import round_trip
from trainer.sim.tasks.interface import Rendering

Actions = NDArray[np.float32]
SEEDS = (11, 12, 15)

process = pytest.mark.process


@pytest.fixture(scope="module")
def recorded() -> dict[int, Actions]:
    """Seed -> the actions of an episode that succeeds, the gripper closed."""
    found = {}
    for seed in SEEDS:
        world, policy, actions = Pushing("pushing", Rendering(image_size=64)), Reader(), []
        view, success = world.reset(seed), False
        while not success:
            [prediction] = policy.predict([PolicyInput(images=view.images, instruction="push")])
            actions.append(np.append(prediction.actions[0, :2], 1.0).astype(np.float32))
            step = world.step(actions[-1])
            view, success = step.view, step.success
            assert len(actions) < world.max_steps
        found[seed] = np.stack(actions)
    return found


def write(
    file: Path,
    recorded: dict[int, Actions],
    task: str = "gripping",
    change: Callable[[Actions], Actions] = lambda actions: actions,
    **more: Any,
) -> Path:
    rows = [
        {"task": task, "instruction": "push", "seed": seed, "actions": change(actions.copy()).tolist(), **more}
        for seed, actions in recorded.items()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def processor_of(tmp_path: Path, tiny_llava: Path, actions: Actions, *, num_bins: int = 256, chunk: int = 1) -> Path:
    """A processor whose bins span the 1st to 99th percentile of these actions."""
    accumulator = StatisticsAccumulator(3)
    accumulator.add(actions, np.arange(len(actions), dtype=np.uint64))
    statistics, sample = accumulator.finish()
    codec = fit_codec("bins", sample, statistics, chunk=chunk, num_bins=num_bins)
    folder = tmp_path / "processor"
    Processor.build(make_config(tiny_llava, tmp_path), codec).save(folder)
    return folder


def run(*arguments: object) -> int:
    return main(["--env-module", "tests.trainer.sim.pushing", "--processes", "2", *map(str, arguments)])


def even(count: int = 2000) -> Actions:
    return np.random.default_rng(0).uniform(-1.05, 1.05, (count, 3)).astype(np.float32)


@process
def test_good_demonstrations_pass_both_gates(
    recorded: dict[int, Actions], tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "train.jsonl", recorded)
    assert run("--data", data, "--processor", processor_of(tmp_path, tiny_llava, even(), chunk=4)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "replay      gripping: 3 of 3 succeed: ok",
        "round trip  gripping: 3 of 3 succeed: ok",
    ]


@process
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a * np.float32([1, -1, 1]), "dimension 1 has the other sign: so changed, 3 of 3 succeed"),
        (lambda a: a * np.float32([1, 1, -1]), "the gripper (the last dimension) has the other sign: so changed, 3 of 3"),
        (lambda a: a * np.float32([0.03, 0.03, 1]), "dimensions 0 to 1 have another unit (at most 0.03; the environment wants"),
        (lambda a: a[:, [1, 0, 2]], "no other sign, gripper convention or unit makes them succeed: compare seeds"),
    ],
)  # fmt: skip
def test_a_failed_replay_says_what_is_wrong(
    change: Callable[[Actions], Actions],
    says: str,
    recorded: dict[int, Actions],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write(tmp_path / "train.jsonl", recorded, change=change)
    assert run("--data", data) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "note: without --processor the round trip is not checked",
        "replay      gripping: 0 of 3 succeed: FAILED",
    ]
    assert says in lines[2]


@process
def test_a_failed_round_trip_names_the_dimension(
    recorded: dict[int, Actions], tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Statistics of data in which dimension 0 hardly moved: its bins cannot say more."""
    data = write(tmp_path / "train.jsonl", recorded)
    narrow = processor_of(tmp_path, tiny_llava, even() * np.float32([0.1, 1, 1]))
    assert run("--data", data, "--processor", narrow) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "replay      gripping: 3 of 3 succeed: ok"
    assert lines[1] == "round trip  gripping: 0 of 3 succeed: FAILED"
    assert len(lines) == 3
    assert "dimension 0: the codec is off by " in lines[2]
    assert "its range does not hold this dimension (see data.action.unmasked and statistics_path)" in lines[2]
    assert lines[2].endswith("with it as recorded, 3 of 3 succeed")


@process
def test_what_was_executed_is_replayed_and_a_simulator_that_dies_is_replaced(
    recorded: dict[int, Actions], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels would fail: they are zero. Each simulator dies once, three deaths are allowed."""
    monkeypatch.setenv("DYING", str(tmp_path))
    data = write(tmp_path / "train.jsonl", recorded, task="dying")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["executed_actions"], row["actions"] = row["actions"], np.zeros((4, 3)).tolist()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--data", data) == 0
    assert "replay      dying: 3 of 3 succeed: ok" in capsys.readouterr().out
    write(tmp_path / "train.jsonl", recorded, task="crashing")
    assert run("--data", data, "--processes", 1) == 1
    assert (
        "4 simulators died, the last one in crashing seed 11: exit code 7; try fewer --processes"
        in capsys.readouterr().err
    )


@process
def test_another_control_mode_is_refused(
    recorded: dict[int, Actions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "train.jsonl", recorded, task="wide")
    assert run("--data", data, "--processes", 1) == 1
    expected = "train.jsonl:1: actions have 3 numbers, and those of wide have 4 (delta_xy): take the environment's control mode"
    assert expected in capsys.readouterr().err


def test_what_is_refused(recorded: dict[int, Actions], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "train.jsonl", recorded)
    other = write(tmp_path / "other.jsonl", recorded, seed=None)
    for arguments, says in (
        ([], "no demonstrations: name JSONL files with --data, or a config with --config"),
        (["--data", tmp_path / "absent.jsonl"], "the demonstrations cannot be read"),
        (["--data", other], "nothing to replay in"),
        (["--data", data, "--task", "PushCube-v1"], "no row has a task and a seed of PushCube-v1"),
        (["--data", write(tmp_path / "unknown.jsonl", recorded, task="Pull")], "unknown task 'Pull'"),
        (["--data", data, "--processor", tmp_path], "the processor cannot be read"),
    ):
        assert run(*arguments) == 1
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("replay: ")
        assert says in line
    other.write_text(other.read_text() + "\n" + data.read_text())
    found = read_recordings([other], per_task=2)
    assert (found.num_without, [one.seed for one in found.episodes]) == (3, [11, 12])
    assert found.episodes[1].place == f"{other}:6"
    for line, says in (
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is a list: an object"),
        ('{"task": "a", "seed": 1}', r"actions have shape \[\]"),
        ('{"task": "a", "seed": 1, "actions": [[1, NaN]]}', "finite numbers"),
        ('{"task": "a", "seed": 1, "actions": [[1, 2], [3]]}', "no numbers of one shape"),
    ):
        other.write_text(line)
        with pytest.raises(DataError, match=says):
            read_recordings([other], per_task=2)


def test_a_round_trip_keeps_the_length(tiny_llava: Path, tmp_path: Path) -> None:
    processor = Processor.load(processor_of(tmp_path, tiny_llava, even(), chunk=4))
    actions = even(10)
    found = round_trip(actions, processor)
    assert found.shape == (10, 3)
    assert float(np.abs(found - np.clip(actions, -1.05, 1.05)).max()) < 2.1 / 256 + 0.02
