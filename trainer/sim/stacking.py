"""`StackGreenOnRed-v1`: the scene of ManiSkill's StackCube-v1 with the other instruction.

A seed starts the same scene in both tasks: a red and a green cube, where either may be stacked on the other. Only the instruction
says which, so a policy succeeds in both tasks only if it reads the instruction.

Imported by `environment.py` when the task is made, since it needs ManiSkill; importing it registers the task.
"""

from typing import Any

from mani_skill.envs.tasks.tabletop.stack_cube import StackCubeEnv
from mani_skill.utils.registration import register_env


@register_env("StackGreenOnRed-v1", max_episode_steps=50)
class StackGreenOnRedEnv(StackCubeEnv):  # type: ignore[misc]  # ManiSkill's class is untyped
    """`cubeA` is the cube to be moved, as in the base class; here it is the green one."""

    cubeA: Any
    cubeB: Any

    def _load_scene(self, options: dict[str, Any]) -> None:
        super()._load_scene(options)
        self._exchange()

    def _initialize_episode(self, env_idx: Any, options: dict[str, Any]) -> None:
        # The base class places cubeA first. It must be the red one, so that a seed has the same scene in both tasks.
        self._exchange()
        super()._initialize_episode(env_idx, options)
        self._exchange()

    def _exchange(self) -> None:
        self.cubeA, self.cubeB = self.cubeB, self.cubeA
