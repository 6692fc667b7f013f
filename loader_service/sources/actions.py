"""Actions as they stand in a row: checked, rid of no-ops, cut into chunks.

Letters: T timesteps, D dimensions of an action, K actions in a chunk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import DataError

NOOP_TRANSLATION = 0.01
"""A shorter movement (Euclidean norm of dx, dy, dz, in action units) is none."""
NOOP_ROTATION = 0.06
"""The same for the rotation."""


def parse_actions(value: object, dim: int) -> NDArray[np.float32]:
    """float32[T, D] from a row's list of lists. Raises DataError whose field is `actions[t][d]`, the first that is wrong."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{_brief(value)}: a list of at least one action is expected", field="actions")
    try:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found below
            actions = np.array(value, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        raise _first_wrong(value, dim) from None
    if actions.ndim != 2 or actions.shape[1] != dim or not np.isfinite(actions).all():
        raise _first_wrong(value, dim)
    return actions


def is_noop(actions: NDArray[np.float32]) -> NDArray[np.bool_]:
    """bool[T]: timesteps of float32[T, 7] that move nothing and keep the gripper as it was told just before (RL4VLA's rule).

    |dxyz| <= 0.01 and |drot| <= 0.06; the first timestep has no gripper command before it, so only its movement counts.
    """
    still: NDArray[np.bool_] = np.linalg.norm(actions[:, :3], axis=1) <= NOOP_TRANSLATION
    still &= np.linalg.norm(actions[:, 3:6], axis=1) <= NOOP_ROTATION
    still[1:] &= actions[1:, 6] == actions[:-1, 6]
    return still


def action_chunks(actions: NDArray[np.float32], chunk: int) -> NDArray[np.float32]:
    """float32[T, K, D]: actions t, t+1, ..., t+K-1; after the end the last one is repeated.

    >>> action_chunks(np.array([[1], [2], [3]], np.float32), 2)[:, :, 0].tolist()
    [[1.0, 2.0], [2.0, 3.0], [3.0, 3.0]]
    """
    if chunk == 1:
        return actions[:, None]
    index = np.arange(len(actions))[:, None] + np.arange(chunk)
    chunks: NDArray[np.float32] = actions[np.minimum(index, max(len(actions) - 1, 0))]
    return chunks


def _first_wrong(value: list[object], dim: int) -> DataError:
    for t, action in enumerate(value):
        if not isinstance(action, list) or len(action) != dim:
            found = f"{len(action)} numbers" if isinstance(action, list) else _brief(action)
            return DataError(f"{found}: an action has {dim} numbers", field=f"actions[{t}]")
        for d, number in enumerate(action):
            if not isinstance(number, int | float):
                return DataError(f"{_brief(number)}: a number is expected", field=f"actions[{t}][{d}]")
            with np.errstate(over="ignore"):
                try:
                    finite = bool(np.isfinite(np.float32(number)))
                except OverflowError:
                    finite = False
            if not finite:
                return DataError(
                    f"{_brief(number)} is not a finite 32-bit number: correct the row or remove the line",
                    field=f"actions[{t}][{d}]",
                )
    return DataError(f"a list of actions of {dim} numbers each is expected", field="actions")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
