"""The evaluator in the real simulator: our tasks behind the interface, and one whole evaluation with colour and depth."""

import json
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.actions import StatisticsAccumulator, fit_codec
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config
from trainer.sim.evaluate import main
from trainer.sim.tasks.interface import Rendering
from trainer.sim.tasks.registry import make_task

pytestmark = [
    pytest.mark.process,
    pytest.mark.simulator,
    pytest.mark.usefixtures("simulator"),
    # The simulator's own libraries warn (deprecations); what they warn about is not ours to mend.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1200),
]


def test_an_episode_does_not_depend_on_those_before_it() -> None:
    environment = make_task("PickCube-v1", Rendering(image_size=32, depth=True))
    actions = np.random.default_rng(0).uniform(-1, 1, (3, environment.action_width)).astype(np.float32)
    runs = []
    for seed in (5, 6, 5):
        seen = [environment.reset(seed), *(environment.step(action).view for action in actions)]
        runs.append((environment.instruction(), seen, environment.step(actions[0]).reward))
    environment.close()
    first, other, again = runs
    assert first[0] == again[0] != other[0]
    assert first[2] == again[2]
    for one, two in zip(first[1], again[1], strict=True):
        assert [(image.dtype.name, image.shape) for image in one.images] == [
            ("uint8", (32, 32, 3)),
            ("uint16", (32, 32)),
        ]
        assert all((a == b).all() for a, b in zip(one.images, two.images, strict=True))
        assert {name: len(values) for name, values in one.states.items()} == {
            "qpos": 9,
            "tcp_pose": 7,
            "state": 9,
            "intrinsic_cv": 3,
            "extrinsic_cv": 3,
        }
        assert all((one.states[name] == two.states[name]).all() for name in one.states)


def test_an_export_plays_held_out_seeds(tiny_llava: Path, tmp_path: Path) -> None:
    accumulator = StatisticsAccumulator(7)
    accumulator.add(np.random.default_rng(0).uniform(-1, 1, (512, 7)), np.arange(512, dtype=np.uint64))
    statistics, sample = accumulator.finish()
    codec = fit_codec("bins", sample, statistics, chunk=1, num_bins=16)
    processor = Processor.build(make_config(tiny_llava, tmp_path), codec).with_num_images((2, 2))
    export = tmp_path / "export"
    export.mkdir()
    for file in tiny_llava.iterdir():
        (export / file.name).write_bytes(file.read_bytes())
    processor.save(export)
    out = tmp_path / "out"
    arguments = ["--model", str(export), "--task", "PushCube-v1", "--episodes", "2", "--processes", "1", "--depth"]
    assert main([*arguments, "--image-size", "32", "--max-steps", "3", "--out", str(out), "--quiet"]) == 0
    tree = json.loads((out / "results.json").read_text())
    assert [(row["seed"], row["steps"]) for row in tree["episodes"]] == [(1_000_000, 3), (1_000_001, 3)]
    assert all(0 < row["reward"] < 1 for row in tree["episodes"])
    assert tree["environments"]["PushCube-v1"] == {
        "cameras": ["base_camera", "base_camera depth"],
        "control_mode": "pd_ee_delta_pose",
        "action_width": 7,
        "max_steps": 50,
    }
    assert (out / "contact_sheet.png").is_file()
