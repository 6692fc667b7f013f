"""Why a gate failed: other actions are played, and those that succeed show the reason.

recorded actions fail      each is played with another sign of one dimension, another convention of the gripper (taken to be the
                           last dimension), another unit of the others
decoded actions fail       each is played with one dimension as recorded
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.sim.replay.plays import Play, Player

Actions = NDArray[np.float32]
EPISODES = 3
"""Of those that failed, how many are played with each change."""
_NORMALISED = 1.001
"""Largest size of an action of a normalised controller."""

_GRIPPERS = (
    ("has the other sign", -1, 0),
    ("is in 0 to 1, where the environment wants -1 to 1", 2, -1),
    ("is in 1 to 0, where the environment wants -1 to 1", -2, 1),
    ("is in -1 to 1, where the environment wants 0 to 1", 0.5, 0.5),
)
"""Conventions: text, factor and offset that turn the recorded number into the environment's."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of all actions of an episode that may be what is missing."""

    says: str
    of: Callable[[Actions], Actions]


def explain_replay(player: Player, failed: Sequence[Play]) -> list[str]:
    """Why recorded actions fail. failed: at least one."""
    some = list(failed[:EPISODES])
    actions = np.concatenate([play.actions for play in some])
    found = []
    for change in changes(actions):
        plays = [replace(play, actions=change.of(play.actions)) for play in some]
        number = sum(player.successes(plays))
        if number > len(some) / 2:
            found.append(f"{change.says}: so changed, {number} of {len(some)} succeed")
    return found or [
        "no other sign, gripper convention or unit makes them succeed: compare seeds, control mode and simulator version with "
        f"those of the recording; {ranges(actions)}"
    ]


def changes(actions: Actions) -> list[Change]:
    """What may be wrong with recorded actions float32[N, D]."""
    last = actions.shape[1] - 1
    found = [
        Change(f"the gripper (the last dimension) {says}", _linear(last, factor, offset))
        for says, factor, offset in _GRIPPERS
    ]
    for dim in range(last):
        found.append(Change(f"dimension {dim} has the other sign", _linear(dim, -1, 0)))
    largest = float(np.abs(actions[:, :last]).max()) if last else 0.0
    if last and (largest > _NORMALISED or 0 < largest < 0.5):
        found.append(
            Change(
                f"dimensions 0 to {last - 1} have another unit (at most {largest:.3g}; the environment wants -1 to 1)",
                lambda a: np.concatenate([a[:, :last] / np.float32(largest), a[:, last:]], axis=1),
            )
        )
    return found


def _linear(dim: int, factor: float, offset: float) -> Callable[[Actions], Actions]:
    """factor x value + offset, of one dimension."""
    return lambda actions: _with(actions, dim, np.float32(factor) * actions[:, dim] + np.float32(offset))


def _with(actions: Actions, dim: int, values: Actions) -> Actions:
    changed = actions.copy()
    changed[:, dim] = values
    return changed


def explain_round_trip(player: Player, recorded: Sequence[Play], decoded: Sequence[Play]) -> list[str]:
    """Why decoded actions fail where the recorded ones succeed. Both: the same episodes, at least one."""
    true = np.concatenate([play.actions for play in recorded])
    back = np.concatenate([play.actions for play in decoded])
    found = []
    for dim in range(true.shape[1]):
        mended = [
            replace(play, actions=_with(play.actions, dim, one.actions[:, dim]))
            for one, play in zip(recorded[:EPISODES], decoded[:EPISODES], strict=True)
        ]
        if np.array_equal(true[:, dim], back[:, dim]):
            continue
        number = sum(player.successes(mended))
        if number > len(mended) / 2:
            found.append(
                f"dimension {dim}: {_error(true[:, dim], back[:, dim])}; with it as recorded, {number} of {len(mended)} succeed"
            )
    if found:
        return found
    worst = sorted(range(true.shape[1]), key=lambda dim: -float(np.abs(true[:, dim] - back[:, dim]).mean()))
    return ["no single dimension is the reason"] + [
        f"dimension {dim}: {_error(true[:, dim], back[:, dim])}" for dim in worst[:3]
    ]


def _error(true: Actions, back: Actions) -> str:
    error = np.abs(true.astype(np.float64) - back)
    text = f"the codec is off by {error.mean():.3g} on average, at most {error.max():.3g}"
    cut = (true < back.min()) | (true > back.max())
    beyond = error > 0.01 * max(float(np.ptp(true)), 1e-9)
    if (cut & beyond).any():
        text += (
            f", and gives back {back.min():.3g} to {back.max():.3g} of the recorded {true.min():.3g} to {true.max():.3g}: its "
            "range does not hold this dimension (see data.action.unmasked and statistics_path)"
        )
    return text


def ranges(actions: Actions) -> str:
    """The values that each dimension has."""
    each = [f"{dim}: {actions[:, dim].min():.3g} to {actions[:, dim].max():.3g}" for dim in range(actions.shape[1])]
    return "the recorded dimensions are " + ", ".join(each)
