"""An observation, as clients of openpi and vla-eval write it -> the inputs of the policy.

    {"observation/image": uint8[H, W, 3], "observation/wrist_image": uint8[H, W, 3], "observation/state": float[8],
     "prompt": "push the cube"}                                                                               openpi
    {"images": {"base_camera": uint8[H, W, 3]}, "states": float[9], "task_description": "push the cube"}      vla-eval

A model that was trained with pictures around the hand also needs `tcp_pose` float[7], `intrinsic_cv` float[3, 3] and
`extrinsic_cv` float[3, 4] under these names, or as `observation/tcp_pose`, `states/tcp_pose` and so on.

Pictures are taken in the order of the message, or in that of the names that the server was given. A name of a nested map is
written with a slash: `images/base_camera`. With an image history in training, the client sends the older pictures too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import DataError
from stoker_proto.images.views import HAND_SHAPES
from stoker_proto.processor import Processor
from trainer.policy_io import PolicyInput

INSTRUCTIONS = ("prompt", "task_description", "instruction")
"""Names of the instruction; the first one that the observation has is taken."""
STATES = ("observation/state", "state", "states", "states/state")
"""Names of the robot's state, likewise."""
PREFIXES = ("", "observation/", "states/")
"""What may stand before the name of a measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationReader:
    """Reads the observations of one policy."""

    images: tuple[str, ...] = ()
    """Names of the pictures, in the order of the training data; empty: all pictures, in the order of the message."""
    state: str | None = None
    """Name of the state; None: one of `STATES`."""
    needs_state: bool = False
    """Whether the policy was trained with a state. Otherwise a state in the observation is not used."""
    measurements: tuple[str, ...] = ()
    """Names of the measurements that the policy needs (`Processor.needed_measurements`). Others are not used."""

    @classmethod
    def of(cls, processor: Processor, *, images: tuple[str, ...] = (), state: str | None = None) -> Self:
        """For policies with this processor."""
        needed = processor.needed_measurements
        return cls(images=images, state=state, needs_state=processor.needs_state, measurements=needed)

    def __call__(self, observation: Mapping[str, Any]) -> PolicyInput:
        """Raises DataError for an observation in which something is missing or of another form."""
        leaves = _leaves(observation)
        instruction = next((leaves[name] for name in INSTRUCTIONS if name in leaves), None)
        if not isinstance(instruction, str):
            raise DataError(f"no instruction: send a text as {' or '.join(INSTRUCTIONS)}; {_found(leaves)}")
        if self.images:
            pictures = [_as_picture(_named(leaves, name), name) for name in self.images]
        else:
            pictures = [_as_picture(value, name) for name, value in leaves.items() if _is_picture(value)]
        measured = {name: _measurement(leaves, name) for name in self.measurements}
        return PolicyInput(images=pictures, instruction=instruction, state=self._state(leaves), measurements=measured)

    def _state(self, leaves: Mapping[str, Any]) -> NDArray[np.float32] | None:
        if not self.needs_state:
            return None
        name = self.state or next((name for name in STATES if name in leaves), None)
        if name is None:
            raise DataError(
                f"no state, with which the model was trained: send it as {' or '.join(STATES)}; {_found(leaves)}"
            )
        return _numbers(_named(leaves, name), name).reshape(-1)


def _measurement(leaves: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    """In its shape in the dataset; flat numbers are arranged so. Raises DataError."""
    shape = HAND_SHAPES[name]
    sent = next((prefix + name for prefix in PREFIXES if prefix + name in leaves), None)
    if sent is None:
        raise DataError(
            f"no {name} float32{list(shape)}: the model was trained with pictures around the hand; send it as "
            f"{' or '.join(prefix + name for prefix in PREFIXES)}; {_found(leaves)}"
        )
    values = _numbers(leaves[sent], sent)
    if values.shape != shape and values.shape != (math.prod(shape),):
        raise DataError(f"{sent} has shape {list(values.shape)}: float32{list(shape)} is expected")
    return values.reshape(shape)


def _numbers(value: Any, name: str) -> NDArray[np.float32]:
    try:
        return np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not numeric: numbers are expected ({error})") from error


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name -> value of a nested map; items of a list of arrays are named by their number."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        nested = value
        if isinstance(value, list) and value and all(isinstance(item, np.ndarray) for item in value):
            nested = {str(number): item for number, item in enumerate(value)}
        if isinstance(nested, Mapping):
            found |= _leaves(nested, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _named(leaves: Mapping[str, Any], name: str) -> Any:
    if name not in leaves:
        raise DataError(f"no {name}; {_found(leaves)}")
    return leaves[name]


def _found(leaves: Mapping[str, Any]) -> str:
    return f"the observation has {', '.join(map(str, leaves)) or 'nothing'}"


def _is_picture(value: Any) -> bool:
    if not isinstance(value, np.ndarray):
        return False
    return (value.dtype == np.uint8 and value.ndim == 3) or (value.dtype == np.uint16 and value.ndim == 2)


def _as_picture(value: Any, name: str) -> NDArray[Any]:
    """uint8[H, W, 3], also of uint8[3, H, W]; depth uint16[H, W] in mm as it is."""
    if not _is_picture(value):
        form = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"{name} is {form}: a picture is uint8[H, W, 3], or depth uint16[H, W] in mm")
    if value.ndim == 3 and value.shape[2] != 3:
        if value.shape[0] != 3:
            raise DataError(f"{name} is {value.dtype}{list(value.shape)}: a picture has three colours, uint8[H, W, 3]")
        return np.ascontiguousarray(value.transpose(1, 2, 0))
    return np.asarray(value)
