"""Which dimensions of an action are normalised by their quantiles: `data.action.unmasked`, or derived from the data.

    x, y, z, roll, pitch, yaw, gripper in [0, 1]          the gripper is left as it is, as in OpenVLA
    7 joints, 7 joints and a gripper, a gripper of 850    every dimension is normalised

What is not normalised must lie in [-1, 1]: codecs clip there.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError

Float64Array = NDArray[np.float64]
Names = tuple[str, ...]
"""The data's own names of the dimensions of an action."""

_DIM, _GRIPPER = 7, 6  # of OpenVLA's end-effector deltas
_GRIPPERS = ("grip", "claw", "jaw", "finger")
_JOINTS = ("joint", "shoulder", "elbow", "wrist", "waist")
_SLACK = 1e-6  # of a float32 at 1.0


def derived_mask(low: Float64Array, high: Float64Array, names: Collection[Names]) -> NDArray[np.bool_]:
    """bool[D]: all true, but for the gripper of a 7-DoF end-effector delta that lies in [-1, 1].

    Args:
        low, high: float64[D], the data's smallest and largest numbers.
        names: of each data set that names its dimensions.
    """
    mask = np.ones(len(low), np.bool_)
    if len(low) == _DIM and not _outside(low, high)[_GRIPPER] and all(map(_may_be_end_effector, names)):
        mask[_GRIPPER] = False
    return mask


def named_mask(low: Float64Array, high: Float64Array, unmasked: tuple[int, ...]) -> NDArray[np.bool_]:
    """bool[D] as data.action.unmasked says. Raises ConfigError for a dimension that is not there or not in [-1, 1]."""
    dim = len(low)
    if any(d < 0 for d in unmasked):
        raise ConfigError(f"data.action.unmasked is {list(unmasked)}: dimensions are counted from 0")
    if any(d >= dim for d in unmasked):
        raise ConfigError(
            f"data.action.unmasked is {list(unmasked)}, and the actions have the dimensions 0 to {dim - 1}: remove the others, "
            "or remove the key, so that the data decides"
        )
    mask = np.array([d not in unmasked for d in range(dim)])
    check_in_range(mask, low, high, f"data.action.unmasked is {list(unmasked)}", "remove it from the key")
    return mask


def check_in_range(mask: NDArray[np.bool_], low: Float64Array, high: Float64Array, who: str, way_out: str) -> None:
    """Raises ConfigError where a dimension without normalisation does not lie in [-1, 1]. who: says so, for the message."""
    wrong = np.flatnonzero(_outside(low, high) & ~mask)
    if len(wrong):
        d = int(wrong[0])
        raise ConfigError(
            f"{who}, so dimension {d} would be clipped to [-1, 1], and the train data has {low[d]:.6g} to {high[d]:.6g} there: "
            f"{way_out}, so that the dimension is normalised"
        )


def _outside(low: Float64Array, high: Float64Array) -> NDArray[np.bool_]:
    outside: NDArray[np.bool_] = (low < -1 - _SLACK) | (high > 1 + _SLACK)
    return outside


def _may_be_end_effector(names: Names) -> bool:
    """Whether names of 7 dimensions allow six movements and a gripper. `motor_0` to `motor_6` say nothing and allow it."""
    words = [name.lower() for name in names]
    if len({re.sub(r"\d+", "", word) for word in words}) == 1:
        return not any(joint in words[0] for joint in _JOINTS)
    is_joint = any(joint in word for word in words[:_GRIPPER] for joint in _JOINTS)
    grippers = [d for d, word in enumerate(words) if any(gripper in word for gripper in _GRIPPERS)]
    return grippers == [_GRIPPER] and not is_joint
