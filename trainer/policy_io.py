"""What goes into a policy and what comes out of it; without torch, so that simulator processes can import it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import StokerError

STATE_NAMES = ("state", "states")
"""Names of the robot's state among the measurements: those that `data.state: text` reads by default."""


class PolicyError(StokerError):
    """The model computes something that cannot become an action."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInput:
    """Everything that a policy is told at one timestep."""

    images: Sequence[NDArray[Any]]
    """As many as in training: each uint8[H, W, 3], or a depth frame uint16[H, W] in mm."""
    instruction: str
    state: NDArray[np.float32] | None = None
    """float32[S] in the dataset's units; only for a model that was trained with `data.state: text`. None: the measurement of this
    name (`STATE_NAMES`)."""
    measurements: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """What the robot measures beside pictures, by the names in the dataset: the state, and where hand and camera are, for a model
    that was trained with `data.options.views` around the hand (`stoker_proto.images.views.HAND_SHAPES`). A model takes what it
    was trained with; the others are not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One chunk of actions, and the tokens that it was decoded from."""

    actions: NDArray[np.float32]
    """float32[chunk, D], in action units."""
    ids: NDArray[np.int64]
    """int64[tokens]; together they fill the chunk exactly."""
    outside_mass: float
    """Probability that the model gives to tokens that are no action tokens, mean over the tokens: in [0, 1]. A trained model
    is close to 0."""
