"""`data.options` of this dataset: which episodes, which columns, which cameras, which moments."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loader_service.sources.options import read_options
from stoker_proto.errors import ConfigError

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of episode indices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeRobotOptions:
    """`data.options` of this dataset."""

    image_keys: tuple[str, ...] | None = None
    """Cameras, in the order in which their frames become the sample's images; default: all, in info.json's order."""
    state_key: str | None = None
    """Feature that is the state; default: `observation.state`, where the data set has one."""
    action_key: str = "action"
    """Feature that is the action."""
    instruction: str | None = None
    """Used as the task of every frame."""
    episodes: Ranges | None = None
    """Episodes of the train paths, e.g. `[0-19, 22]`, ends included; default: all."""
    val_episodes: Ranges | None = None
    """The same for the validation paths."""
    action_delta_timestamps: tuple[float, ...] | None = None
    """When, in seconds from the frame on, the actions of a chunk are taken: multiples of 1/fps, data.action.chunk of them;
    default: 0, 1/fps, 2/fps ..."""
    match_frames: Literal["timestamp", "frame_index"] = "timestamp"
    """How a row finds its frame of a video. `timestamp`: by time, and the count of frames must agree. `frame_index`: by the count
    alone, where a clock drifts; neither the rows' timestamps nor the video's times are looked at."""
    image_history: tuple[float, ...] = (0.0,)
    """When, in seconds from the frame on (0 or before), each camera's images were taken: multiples of 1/fps, oldest first."""


def read_lerobot_options(options: Mapping[str, Any]) -> LeRobotOptions:
    """The options, checked. Raises ConfigError naming the key."""
    readers = {
        "image_keys": _names,
        "state_key": _text,
        "action_key": _text,
        "instruction": _text,
        "episodes": _ranges,
        "val_episodes": _ranges,
        "action_delta_timestamps": _seconds,
        "image_history": _history,
        "match_frames": _match_frames,
    }
    return read_options(LeRobotOptions, options, "lerobot", readers)


def overlap(a: Ranges | None, b: Ranges | None) -> bool:
    """Whether an episode is in both; None: all episodes."""
    if a is None or b is None:
        return True
    return any(start < other_stop and other < stop for start, stop in a for other, other_stop in b)


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{key} is {value!r}: a text is expected")
    return value


def _match_frames(key: str, value: object) -> Literal["timestamp", "frame_index"]:
    if value == "timestamp":
        return "timestamp"
    if value == "frame_index":
        return "frame_index"
    raise ConfigError(f"{key} is {value!r}: timestamp or frame_index is expected")


def _names(key: str, value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{key} is {value!r}: a list of features is expected")
    if len(set(names)) != len(names):
        raise ConfigError(f"{key} is {value!r}: a camera is named twice")
    return tuple(names)


def _ranges(key: str, value: object) -> Ranges:
    """`[0-19, 22]` -> ((0, 20), (22, 23))."""
    items = value if isinstance(value, list | tuple) else [value]
    ranges = []
    for item in items:
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?\s*", str(item))
        if isinstance(item, bool) or not match or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"{key}: {item!r} is no episode and no range of episodes: write e.g. [0-19, 22]")
        ranges.append((int(match[1]), int(match[2] or match[1]) + 1))
    if not ranges:
        raise ConfigError(f"{key} is empty: name episodes, or leave it out for all of them")
    return tuple(sorted(ranges))


def _seconds(key: str, value: object) -> tuple[float, ...]:
    items: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not items or not all(type(item) in (int, float) and math.isfinite(item) for item in items):
        raise ConfigError(f"{key} is {value!r}: a list of seconds is expected")
    return tuple(float(item) for item in items)


def _history(key: str, value: object) -> tuple[float, ...]:
    seconds = _seconds(key, value)
    if list(seconds) != sorted(set(seconds)) or seconds[-1] > 0:
        raise ConfigError(f"{key} is {value!r}: seconds up to 0 are expected, oldest first, e.g. [-0.2, -0.1, 0]")
    return seconds
