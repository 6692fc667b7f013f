"""Our table-top tasks as the evaluator sees them: the collector's own camera, controller and instruction."""

import numpy as np
from numpy.typing import NDArray

from trainer.sim.environment import ACTION_WIDTH, CONTROL_MODE, Environment, Observation
from trainer.sim.tasks.interface import Rendering, Step, View

MAX_STEPS = {"PushCube-v1": 50, "PullCube-v1": 50, "PickCube-v1": 60, "StackCube-v1": 100, "StackGreenOnRed-v1": 100}
"""About four times what the experts take (Stack: two and a half times)."""


class ShippedTask:
    """A `TaskEnvironment`. States, as in the collector's NPZ files: `qpos` float32[9], `tcp_pose` float32[7], `state` float32[9],
    and the camera's matrices."""

    control_mode = CONTROL_MODE
    action_width = ACTION_WIDTH

    def __init__(self, task: str, rendering: Rendering) -> None:
        """Raises SimulatorUnavailableError."""
        depth, wrist = rendering.depth, rendering.wrist_camera
        self._environment = Environment(task, image_size=rendering.image_size, depth=depth, wrist_camera=wrist)
        names = {"base_camera": True, "base_camera depth": depth, "hand_camera": wrist}
        self.cameras = tuple(name for name, is_there in names.items() if is_there)
        self.max_steps = MAX_STEPS[task]

    def reset(self, seed: int) -> View:
        """The scene is rebuilt, so that an episode does not depend on those before it."""
        return _view(self._environment.reset(seed))

    def instruction(self) -> str:
        """As the collector writes it."""
        return self._environment.instruction()

    def step(self, action: NDArray[np.float32]) -> Step:
        """Success and reward are ManiSkill's own."""
        observation, success = self._environment.step(action)
        reward, outcome = self._environment.reward, self._environment.outcome()
        return Step(view=_view(observation), success=success, reward=reward, outcome=outcome)

    def close(self) -> None:
        """Free the scene and the renderer."""
        self._environment.close()


def _view(observation: Observation) -> View:
    """The sensors of an observation."""
    pictures = (observation.rgb, observation.depth, observation.wrist_rgb)
    images = tuple(picture for picture in pictures if picture is not None)
    names = ("qpos", "tcp_pose", "state", "intrinsic_cv", "extrinsic_cv")
    return View(images=images, states={name: getattr(observation, name) for name in names})
