"""The demonstrations that the repository carries pass the replay in the real simulator, and fail it with another gripper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.sim.replay.command import main

DEMONSTRATIONS = Path(__file__).resolve().parents[2] / "data" / "maniskill" / "val.jsonl"
pytestmark = [
    pytest.mark.process,
    pytest.mark.simulator,
    pytest.mark.usefixtures("simulator"),
    # The simulator's own libraries warn (deprecations); what they warn about is not ours to mend.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1200),
]


def test_recorded_actions_replay_and_another_gripper_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(DEMONSTRATIONS), "--episodes", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line for line in lines if line.startswith("replay")) == [
        f"replay      {task}-v1: 1 of 1 succeed: ok" for task in ("PickCube", "PullCube", "PushCube", "StackCube")
    ]
    rows = [json.loads(line) for line in DEMONSTRATIONS.read_text().splitlines()]
    row = next(row for row in rows if row["task"] == "PickCube-v1")
    row["actions"] = [[*action[:6], (1 - action[6]) / 2] for action in row["actions"]]
    changed = tmp_path / "changed.jsonl"
    changed.write_text(json.dumps(row) + "\n")
    assert main(["--data", str(changed)]) == 1
    text = capsys.readouterr().out
    assert "replay      PickCube-v1: 0 of 1 succeed: FAILED" in text
    assert (
        "the gripper (the last dimension) is in 1 to 0, where the environment wants -1 to 1: so changed, 1 of 1" in text
    )
