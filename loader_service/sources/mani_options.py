"""`data.options` of `mani_openpi`: names of the arrays in the NPZ, image history, numbers of an action."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loader_service.sources.options import read_options
from stoker_proto.errors import ConfigError
from stoker_proto.images.views import Views

Names = tuple[str, ...]
"""Names that an array may have; the first that exists is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManiOpenPIOptions:
    """`data.options` of this dataset."""

    rgb_keys: Names = ("rgb", "image", "images")
    """Names that the colour frames of the only camera may have in the NPZ."""
    camera_keys: tuple[Names, ...] = ()
    """Several cameras, in the order of the sample's images, each by its name or by names that its frames may have, e.g.
    `[rgb, [wrist_rgb, wrist]]`; takes the place of `rgb_keys`."""
    depth_keys: Names = ("depth",)
    """Names that the depth frames may have; they belong to the first camera."""
    state_keys: Names = ("state", "states")
    """Names that the states may have, where the row has no `states`. They are read with `data.state: text`, or if this is set."""
    image_history: tuple[int, ...] = (0,)
    """When each camera's images were taken, in frames from the timestep on (0 or before), oldest first, e.g. `[-1, 0]`."""
    views: Views | None = None
    """Several images out of each frame of the only camera: fixed crops, and crops around the projected hand, e.g. `[{crop: [0,
    48, 224, 160]}, {hand: [96, 96]}]` (see `stoker_proto/images/views.py`). The latter need the arrays `tcp_pose` [T, 7],
    `intrinsic_cv` [T, 3, 3] and `extrinsic_cv` [T, 3, 4] in the NPZ. Policies of the exported model do the same."""
    auxiliary_keys: Names = ()
    """Names that an array [T, A] may have which training predicts beside the actions (`trainer.loss.auxiliary_weight`), such as
    the true positions of objects. It is no input: a policy needs none."""
    action_dim: int = 7
    """Numbers in an action."""

    def cameras(self) -> dict[str, Names]:
        """Key of the file -> names of a camera's frames."""
        if not self.camera_keys:
            return {"data.options.rgb_keys": self.rgb_keys}
        return {f"data.options.camera_keys[{n}]": names for n, names in enumerate(self.camera_keys)}


def read_mani_options(options: Mapping[str, Any]) -> ManiOpenPIOptions:
    """The options, checked. Raises ConfigError naming the key."""
    readers = {
        "rgb_keys": _names,
        "camera_keys": _cameras,
        "depth_keys": _names,
        "state_keys": _names,
        "image_history": _history,
        "views": lambda key, value: Views.parse(value),
        "auxiliary_keys": _names,
        "action_dim": _dim,
    }
    found = read_options(ManiOpenPIOptions, options, "mani_openpi", readers)
    if "rgb_keys" in options and "camera_keys" in options:
        raise ConfigError(
            "data.options.rgb_keys stands beside data.options.camera_keys: make it the first of the cameras, "
            f"e.g. camera_keys: [[{', '.join(found.rgb_keys)}], ...]"
        )
    if found.views is not None and (len(found.cameras()) > 1 or found.image_history != (0,)):
        raise ConfigError(
            "data.options.views makes several images of one camera at one moment: leave out camera_keys of several cameras, and "
            "image_history"
        )
    return found


def _dim(key: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key} is {value!r}: a whole number of at least 1 is expected")
    return value


def _names(key: str, value: object) -> Names:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{key} is {value!r}: a list of names of arrays is expected")
    return tuple(names)


def _cameras(key: str, value: object) -> tuple[Names, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{key} is {value!r}: a list of cameras is expected, e.g. [rgb, [wrist_rgb, wrist]]")
    cameras = tuple(_names(f"{key}[{n}]", names) for n, names in enumerate(value))
    known: dict[str, int] = {}
    for n, names in enumerate(cameras):
        for name in names:
            if known.setdefault(name, n) != n:
                raise ConfigError(
                    f"{key}: {name} may be camera {known[name]} and camera {n}: both could show the same, leave it to one of them"
                )
    return cameras


def _history(key: str, value: object) -> tuple[int, ...]:
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(type(offset) is int and offset <= 0 for offset in value)
        or list(value) != sorted(set(value))
    ):
        raise ConfigError(f"{key} is {value!r}: frames up to 0 are expected, oldest first, e.g. [-2, -1, 0]")
    return tuple(value)
