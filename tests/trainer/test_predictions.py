"""The sheet that `make demo` ends with: real frames, a policy of the demo's kind, arrows where they belong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stoker_proto.actions import StatisticsAccumulator, fit_codec
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config
from trainer.examples import predictions
from trainer.models.families import family_of, read_model_config
from trainer.models.robot.building import RobotSizes
from trainer.models.tiny import build_tiny
from trainer.policy import Policy

DATA = Path(__file__).resolve().parents[1] / "data" / "pushcube" / "val.jsonl"


@pytest.mark.long
def test_recorded_and_predicted_actions_are_drawn_where_the_hand_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_tiny("robot", tmp_path / "model", image_size=16, robot=RobotSizes(num_views=1))
    recorded = predictions.read(DATA)
    actions, states = StatisticsAccumulator(7), StatisticsAccumulator(9)
    for number, trajectory in enumerate(recorded):
        keys = np.arange(len(trajectory.actions), dtype=np.uint64) + 1000 * number
        actions.add(trajectory.actions.astype(np.float64), keys)
        states.add(trajectory.arrays["state"].astype(np.float64), keys)
    codec = fit_codec("bins", actions.finish()[1], actions.finish()[0], chunk=1)
    config = make_config(tmp_path / "model", tmp_path, data={"state": "text"})
    processor = Processor.build(config, codec, states.finish()[0])
    family = family_of(read_model_config(str(tmp_path / "model")))
    model = family.auto_class.from_pretrained(tmp_path / "model", dtype=torch.float32)
    monkeypatch.setattr(predictions.Policy, "load", lambda folder: Policy(model, processor, family))
    assert predictions.main(["--model", "any", "--data", str(DATA), "--out", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr().out
    figure = re.search(
        r"87 recorded frames: mean action error ([\d.]+); that of the best constant action is 0.1151\n", said
    )
    assert figure is not None, said
    assert float(figure[1]) > 0.115, "random weights are worse than the median"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 192, 10 * (16 + 192))
    first = recorded[0]
    column, row = first.pixel(first.arrays["tcp_pose"][0][:3], 0)
    drawn = predictions.draw(first, first.actions)
    assert tuple(drawn[16 + round(row), round(column)]) == (255, 0, 0), "the red arrow begins at the hand"
    assert np.abs(drawn[16:, :192].astype(int) - drawn[16:, 192:384].astype(int)).max() > 0


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "export")
    assert predictions.main(["--model", missing, "--data", str(DATA), "--out", str(tmp_path / "sheet.png")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("predictions: ")
    assert missing in line
