"""Demonstrations of the collector pass the replay in the real simulator, and fail it with another gripper convention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer.sim.conftest import DEADLINE_S, Collector
from trainer.sim.replay.command import main

pytestmark = [
    pytest.mark.process,
    pytest.mark.simulator,
    pytest.mark.usefixtures("simulator"),
    # The simulator's own libraries warn (deprecations); what they warn about is not ours to mend.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1200),
]


def test_collected_demonstrations_replay(
    collector: Collector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demos"
    process = collector("--task", "PickCube-v1", "--num", 2, "--image-size", 8, "--out", out, "--quiet")
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    data = out / "train.jsonl"
    assert main(["--data", str(data), "--processes", "2"]) == 0
    assert "replay      PickCube-v1: 2 of 2 succeed: ok" in capsys.readouterr().out
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        name = "executed_actions" if "executed_actions" in row else "actions"
        row[name] = [[*action[:6], -action[6]] for action in row[name]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["--data", str(data), "--processes", "2"]) == 1
    text = capsys.readouterr().out
    assert "replay      PickCube-v1: 0 of 2 succeed: FAILED" in text
    assert "the gripper (the last dimension) has the other sign: so changed, 2 of 2 succeed" in text
