"""An export acts in the collector: it is told what the sensors measure, and its first action is executed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stoker_proto.errors import ConfigError
from tests.trainer.models.test_robot import MEASURED, SIZES, processor_of
from trainer.models.tiny import build_tiny
from trainer.policy import Policy
from trainer.policy_io import PolicyInput
from trainer.sim.environment import Observation
from trainer.sim.policy_actor import load_act


def test_the_policy_is_told_frame_state_and_camera(tmp_path: Path) -> None:
    export = tmp_path / "export"
    build_tiny("robot", export, image_size=16, robot=SIZES)
    processor_of(export, tmp_path).save(export)
    frame = np.random.default_rng(2).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    state = np.array([0.5, -0.25, 0.0], np.float32)
    seen = Observation(rgb=frame, depth=None, qpos=np.zeros(9, np.float32), state=state, **MEASURED)
    action = load_act(str(export))(seen, "push the cube")
    told = PolicyInput(images=[frame], instruction="push the cube", state=state, measurements=MEASURED)
    expected = Policy.load(export).predict([told])[0].actions[0]
    assert action.dtype == np.float64
    np.testing.assert_array_equal(action, expected.astype(np.float64))
    assert load_act(str(export)) is load_act(str(export))  # loaded once in a process
    with pytest.raises(ConfigError, match=r"absent"):
        load_act(str(tmp_path / "absent"))
