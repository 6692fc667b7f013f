"""What the evaluator needs of an environment.

A user's environment implements `TaskEnvironment` and registers itself (`registry.py`). A policy gets the `View` and the
instruction, nothing else. If an environment put the true state into a view, the policy would be measured with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How the cameras shall draw; an environment with cameras of a fixed size may ignore it."""

    image_size: int = 128
    """Height and width of a picture, pixels."""
    depth: bool = False
    """Add a depth frame behind the first camera's picture, as `data.image.depth` does in training."""
    wrist_camera: bool = False
    """Add a picture of the camera on the hand, as the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the robot's sensors measure at one timestep."""

    images: tuple[NDArray[Any], ...]
    """One for each name of `cameras`, in the order of the training data: uint8[H, W, 3], or depth uint16[H, W] in mm."""
    states: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Measurements of the robot's own body and camera by name, float32: joint angles, pose of the hand, camera matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The result of one action."""

    view: View
    success: bool
    """Whether the task is solved at this moment."""
    reward: float = 0.0
    outcome: str = ""
    """What has been done at this moment, where the scene has several valid instructions ("red on green"); else empty."""


class TaskEnvironment(Protocol):
    """One environment; one process uses it. Attributes may be class attributes."""

    cameras: tuple[str, ...]
    """Names of the pictures in a view, in the order of the training data."""
    control_mode: str
    """What the numbers of an action mean; shown and recorded, since a policy of another one moves wrongly."""
    action_width: int
    """D: numbers of one action."""
    max_steps: int
    """The step at which an episode ends without success."""

    def reset(self, seed: int) -> View:
        """Start the episode of a seed. It must not depend on the episodes before it."""

    def instruction(self) -> str:
        """The instruction of this episode."""

    def step(self, action: NDArray[np.float32]) -> Step:
        """Execute one action float32[D]."""

    def close(self) -> None:
        """Free what it holds."""
