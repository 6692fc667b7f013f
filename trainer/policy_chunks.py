"""One action at a time from a policy that predicts chunks: predict, execute the first actions of the chunk, look again.

    player = ChunkPlayer(policy, execute=4)       # chunks of 8: the last 4 actions of each are never executed
    player.reset()                                # at the start of each episode
    action = player.next_action(PolicyInput(images=[frame], instruction="push the cube"))     # float32[D]

`execute` is the replan horizon. 1 looks before each action and costs a prediction each; the whole chunk costs the fewest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError
from trainer.policy_io import PolicyInput, Prediction


class ChunkPredictor(Protocol):
    """The part of `trainer.policy.Policy` that a player uses."""

    @property
    def chunk(self) -> int:
        """Timesteps of a predicted chunk."""

    def predict(self, inputs: Sequence[PolicyInput]) -> list[Prediction]:
        """One prediction for each input, in their order."""


def check_execute(execute: int | None, chunk: int, name: str = "execute") -> int:
    """The number of actions to execute of each chunk; None: all. Raises ConfigError for more than the chunk has.

    name: of the option, for the message.
    """
    if execute is not None and not 1 <= execute <= chunk:
        raise ConfigError(f"{name} {execute}: the model predicts chunks of {chunk}; choose 1 to {chunk}")
    return execute or chunk


class ChunkPlayer:
    """The actions of one episode; not for two episodes at a time."""

    def __init__(self, policy: ChunkPredictor, execute: int | None = None) -> None:
        """execute: actions of a chunk to execute before the policy looks again; None: all. Raises ConfigError."""
        self._policy, self._execute = policy, check_execute(execute, policy.chunk)
        self._waiting: deque[NDArray[np.float32]] = deque()
        self.outside_mass = 0.0
        """Of the newest prediction: see `Prediction.outside_mass`."""

    @property
    def needs_prediction(self) -> bool:
        """Whether the next action needs a look at the pictures; those given otherwise are not used."""
        return not self._waiting

    def reset(self) -> None:
        """A new episode: actions that wait belong to the old one."""
        self._waiting.clear()

    def next_action(self, one: PolicyInput) -> NDArray[np.float32]:
        """float32[D]: the next action. Raises as `Policy.act`."""
        if not self._waiting:
            [prediction] = self._policy.predict([one])
            self._waiting.extend(prediction.actions[: self._execute])
            self.outside_mass = prediction.outside_mass
        return self._waiting.popleft()
