"""Actions and states as they stand in a row: checked; and which actions move nothing.

Letters: T timesteps, D dimensions of an action, S numbers of a state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import DataError

NOOP_TRANSLATION = 0.01
"""Longest movement (Euclidean norm of dx, dy, dz, in action units) that counts as no movement."""
NOOP_ROTATION = 0.06
"""The same for the rotation."""


def parse_actions(value: object, dim: int) -> NDArray[np.float32]:
    """float32[T, D] from a row's list of lists. Raises DataError whose field is `actions[t][d]`, the first that is wrong."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{_brief(value)}: a list of at least one action is expected", field="actions")
    return _parse(value, dim, "an action", "actions")


def parse_states(value: object, num_actions: int) -> NDArray[np.float32]:
    """float32[T, S] from a row's list of lists, T = num_actions or one more. Raises DataError whose field is `states[t][s]`."""
    if not isinstance(value, list) or not value or not isinstance(value[0], list) or not value[0]:
        raise DataError(f"{_brief(value)}: one list of numbers for each action is expected", field="states")
    states = _parse(value, len(value[0]), "a state", "states")
    if len(states) not in (num_actions, num_actions + 1):
        raise DataError(
            f"{len(states)} states and {num_actions} actions: as many states, or one more, are expected", field="states"
        )
    return states


def is_noop(actions: NDArray[np.float32]) -> NDArray[np.bool_]:
    """bool[T]: timesteps of float32[T, 7] that move nothing and repeat the gripper command before them (RL4VLA's rule).

    |dxyz| <= 0.01 and |drot| <= 0.06; the first timestep has no gripper command before it, so only its movement counts.
    """
    still: NDArray[np.bool_] = np.linalg.norm(actions[:, :3], axis=1) <= NOOP_TRANSLATION
    still &= np.linalg.norm(actions[:, 3:6], axis=1) <= NOOP_ROTATION
    still[1:] &= actions[1:, 6] == actions[:-1, 6]
    return still


def _parse(value: list[object], dim: int, one: str, field: str) -> NDArray[np.float32]:
    """float32[T, dim]. one, field: name of a row and of the whole, for messages."""
    try:
        with np.errstate(over="ignore"):  # too large numbers become infinite, and are found below
            numbers = np.array(value)
            if numbers.dtype.kind not in "biuf":  # numpy would read the text "0.1" as a number
                raise ValueError(numbers.dtype)
            vectors = numbers.astype(np.float32)
    except (ValueError, TypeError, OverflowError):
        raise _first_wrong(value, dim, one, field) from None
    if vectors.ndim != 2 or vectors.shape[1] != dim or not np.isfinite(vectors).all():
        raise _first_wrong(value, dim, one, field)
    return vectors


def _first_wrong(value: list[object], dim: int, one: str, field: str) -> DataError:
    for t, vector in enumerate(value):
        if not isinstance(vector, list) or len(vector) != dim:
            found = f"{len(vector)} numbers" if isinstance(vector, list) else _brief(vector)
            remedy = "; set data.options.action_dim to the numbers of your robot" if field == "actions" else ""
            return DataError(f"{found}: {one} has {dim} numbers{remedy}", field=f"{field}[{t}]")
        for d, number in enumerate(vector):
            if not isinstance(number, int | float):
                return DataError(f"{_brief(number)}: a number is expected", field=f"{field}[{t}][{d}]")
            with np.errstate(over="ignore"):
                try:
                    finite = bool(np.isfinite(np.float32(number)))
                except OverflowError:
                    finite = False
            if not finite:
                return DataError(
                    f"{_brief(number)} is not a finite 32-bit number: correct the row or remove the line",
                    field=f"{field}[{t}][{d}]",
                )
    return DataError(f"a list of {field} of {dim} numbers each is expected", field=field)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
