"""Any ManiSkill (or gymnasium) environment with camera images, as the evaluator sees it.

    @register("PutOnPlateInScene25Main-v3")
    def make(task: str, rendering: Rendering) -> GymTask:
        mode = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
        env = gymnasium.make(task, num_envs=1, obs_mode="rgb", control_mode=mode, sim_backend="physx_cpu")
        return GymTask(env, cameras=("3rd_view_camera",), control_mode=mode, action_width=7, max_steps=80,
                       conventions=Conventions(reset_options={"obj_set": "test"}))

Values may be numbers, arrays, or tensors on any device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError
from trainer.sim.tasks.interface import Step, View


def spoken_instruction(environment: Any) -> str:
    """`get_language_instruction()` of the environment, as SimplerEnv's and RL4VLA's have it; a text, or a list of one."""
    text = environment.unwrapped.get_language_instruction()
    return str(text[0] if isinstance(text, list | tuple) else text)


def unchanged(action: NDArray[np.float32]) -> NDArray[np.float32]:
    """The policy's action as it is."""
    return action


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """How to talk to an environment; the defaults suit ManiSkill's with `num_envs=1`."""

    instruction: Callable[[Any], str] = spoken_instruction
    """The task in words, of an environment after its reset."""
    prepare_action: Callable[[NDArray[np.float32]], NDArray[np.float32]] = unchanged
    """float32[D] of the policy -> the environment's, where the convention of a gripper differs."""
    reset_options: Mapping[str, Any] = field(default_factory=dict)
    """Beside `reconfigure: True`, which makes an episode independent of those before it."""
    batched: bool = True
    """Values of the environment have a first dimension of 1."""


class GymTask:
    """A `TaskEnvironment` around `reset(seed=, options=)` and `step(action)` as gymnasium defines them."""

    def __init__(
        self,
        environment: Any,
        *,
        cameras: tuple[str, ...],
        control_mode: str,
        action_width: int,
        max_steps: int,
        conventions: Conventions = Conventions(),
    ) -> None:
        """cameras: names in `observation["sensor_data"]`; the other three as in `TaskEnvironment`."""
        self.cameras, self.control_mode = cameras, control_mode
        self.action_width, self.max_steps = action_width, max_steps
        self._environment, self._conventions = environment, conventions

    def reset(self, seed: int) -> View:
        """Rebuild the scene of a seed."""
        observation, _ = self._environment.reset(
            seed=seed, options={"reconfigure": True, **self._conventions.reset_options}
        )
        return self._view(observation)

    def instruction(self) -> str:
        """By the function of the conventions."""
        return self._conventions.instruction(self._environment)

    def step(self, action: NDArray[np.float32]) -> Step:
        """Success is `info["success"]`."""
        observation, reward, _, _, info = self._environment.step(self._conventions.prepare_action(action))
        success = bool(self._single(info["success"]))
        return Step(view=self._view(observation), success=success, reward=float(self._single(reward)))

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()

    def _view(self, observation: Mapping[str, Any]) -> View:
        sensors = observation["sensor_data"]
        missing = [name for name in self.cameras if name not in sensors]
        if missing:
            raise ConfigError(f"the environment has no camera {', '.join(missing)}; it has {', '.join(sensors)}")
        images = tuple(self._single(sensors[name]["rgb"])[..., :3].astype(np.uint8) for name in self.cameras)
        agent = observation.get("agent", {})
        return View(images=images, states={name: self._single(agent[name]).astype(np.float32) for name in agent})

    def _single(self, value: Any) -> Any:
        array = np.asarray(value.cpu() if hasattr(value, "cpu") else value)
        return array[0] if self._conventions.batched else array
