"""Noise that pushes an expert off its path, so that demonstrations show how to return.

The disturbed action is executed, the expert's own action in the disturbed state stays the label. An expert must be Markov for
this: it has to know the way from any state.
"""

import numpy as np

from trainer.sim.environment import FloatArray


class Noise:
    """Bursts of disturbance of one episode: the hand is moved aside for 1-3 steps, or the gripper is turned round.

    Six of ten episodes begin with up to 6 steps in a random direction, so that they start from elsewhere.
    """

    _CALM_AFTER = 45
    """Steps after which an episode is left alone, so that it comes to its end."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._scale, self._rate = rng.choice([0.15, 0.3, 0.6]), rng.choice([0.08, 0.15, 0.25])
        self._opening = int(rng.integers(1, 7)) if rng.random() < 0.6 else 0
        self._direction = rng.uniform(-0.9, 0.9, 3)
        self._push, self._push_left, self._flip_left, self._steps = np.zeros(3), 0, 0, 0

    def disturb(self, action: FloatArray) -> FloatArray:
        """The action to execute for the expert's action float64[7]; within [-1, 1]."""
        disturbed = action.copy()
        self._steps += 1
        if self._steps <= self._opening:
            disturbed[:3] = self._direction
            return disturbed
        if self._steps > self._CALM_AFTER:
            return disturbed
        if self._push_left == 0 and self._rng.random() < self._rate:
            self._push_left, self._push = int(self._rng.integers(1, 4)), self._rng.normal(0, self._scale, 3)
        if self._push_left:
            self._push_left -= 1
            disturbed[:3] += self._push + self._rng.normal(0, 0.3 * self._scale, 3)
        if self._flip_left == 0 and self._rng.random() < 0.02:
            self._flip_left = int(self._rng.integers(1, 4))
        if self._flip_left:
            self._flip_left -= 1
            disturbed[6] = -disturbed[6]
        return np.clip(disturbed, -1.0, 1.0)
