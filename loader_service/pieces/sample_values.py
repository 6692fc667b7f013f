"""Checks what `read` of a dataset class returned: users write such classes, and a wrong value is a bad sample.

All that comes later works on checked values. An exception there is a bug of Stoker's, and no verdict on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.base import Sample
from stoker_proto.errors import DataError


def checked_sample(sample: object) -> Sample:
    """The sample, its state and action as float32 arrays. Raises DataError naming the field that is wrong."""
    if not isinstance(sample, Sample):
        raise DataError(f"`read` gave a {type(sample).__name__}: each item must be a Sample")
    for image in sample.images:
        if not isinstance(image, np.ndarray):
            raise DataError(f"`Sample.images` has a {type(image).__name__}: NumPy arrays are expected")
    if not isinstance(sample.instruction, str):
        raise DataError(f"`Sample.instruction` is a {type(sample.instruction).__name__}: a str is expected")
    if sample.answer is not None and not isinstance(sample.answer, str):
        raise DataError(f"`Sample.answer` is a {type(sample.answer).__name__}: a str is expected")
    pad = sample.action_is_pad
    if pad is not None and (not isinstance(pad, np.ndarray) or pad.dtype != np.bool_):
        raise DataError(f"`Sample.action_is_pad` is a {type(pad).__name__}: an array bool[K] is expected")
    action, state = sample.action, sample.state
    if action is not None:
        action = _float32(action, "action", 2)
    if state is not None:
        state = _float32(state, "state", 1)
    if action is sample.action and state is sample.state:  # nearly always: a copy of each sample would be felt
        return sample
    return replace(sample, action=action, state=state)


def _float32(values: object, name: str, ndim: int) -> NDArray[np.float32]:
    try:
        array = np.asarray(values, np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"`Sample.{name}` cannot be read as numbers ({error})") from error
    if array.ndim != ndim:
        raise DataError(f"`Sample.{name}` has shape {list(array.shape)}: {ndim} dimensions are expected")
    return array


def stacked(actions: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """float32[n, K, D] of the action chunks of one record. Raises DataError where they differ in shape."""
    first = actions[0].shape
    for number, action in enumerate(actions):
        if action.shape != first:
            raise DataError(
                f"action {number} of the record has shape {list(action.shape)}, the first one {list(first)}: all need the same"
            )
    return np.stack(actions)
