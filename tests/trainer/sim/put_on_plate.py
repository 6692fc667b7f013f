"""A stand-in with the interface of RL4VLA's PutOnPlateInScene25Main-v3, and the adapter that a user writes for it.

The environment itself is not on PyPI and needs assets. Its interface, as its own wrapper uses it: batches of `num_envs` as torch
tensors, pictures under `sensor_data/3rd_view_camera/rgb`, `get_language_instruction()` returning a list, `obs_set` among the
options of `reset`, a gripper that takes -1 or 1.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.sim.tasks.gym_task import Conventions, GymTask
from trainer.sim.tasks.interface import Rendering
from trainer.sim.tasks.registry import register

MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"


class PutOnPlateInScene:
    """One environment in a batch of one."""

    def __init__(self, num_envs: int, control_mode: str) -> None:
        assert (num_envs, control_mode) == (1, MODE)
        self.unwrapped = self
        self.is_open = True

    def reset(self, *, seed: int, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        assert options == {"reconfigure": True, "obj_set": "test"}
        self.seed, self.height = seed, 0.0
        return self._observation(), {}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        assert action.shape == (7,)
        assert float(action[6]) in (-1.0, 1.0), "the gripper takes -1 or 1"
        self.height += float(action[2])
        success = torch.tensor([self.height > 0.45 and action[6] == 1.0])
        no = torch.zeros(1, dtype=torch.bool)
        return self._observation(), torch.tensor([self.height]), no, no, {"success": success}

    def get_language_instruction(self) -> list[str]:
        return [f"put object {self.seed} on plate"]

    def close(self) -> None:
        self.is_open = False

    def _observation(self) -> dict[str, Any]:
        picture = torch.full((1, 48, 64, 3), self.seed, dtype=torch.uint8)
        return {"agent": {"qpos": torch.zeros(1, 8)}, "sensor_data": {"3rd_view_camera": {"rgb": picture}}}


def gripper_of_rl4vla(action: NDArray[np.float32]) -> NDArray[np.float32]:
    """Its policies say how far the gripper is open, in [0, 1]."""
    return np.append(action[:6], 1.0 if action[6] > 0.5 else -1.0).astype(np.float32)


@register("PutOnPlateInScene25Main-v3")
def make(task: str, rendering: Rendering) -> GymTask:
    """In a user's module: `gymnasium.make(task, num_envs=1, control_mode=MODE, ...)`."""
    return GymTask(
        PutOnPlateInScene(num_envs=1, control_mode=MODE),
        cameras=("3rd_view_camera",),
        control_mode=MODE,
        action_width=7,
        max_steps=80,
        conventions=Conventions(prepare_action=gripper_of_rl4vla, reset_options={"obj_set": "test"}),
    )
