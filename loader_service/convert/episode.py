"""What every format is converted to (`Episode`), and the interface of a format (`EpisodeSource`).

Letters: F frames, T actions of an episode (F = T, or T + 1 where the last frame was seen after the last action), D numbers
of an action, S of a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import DataError

MAX_EPISODE_BYTES = 4 << 30
"""Of all frames of an episode: what the loader reads of one array."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRef:
    """One episode of the input, before it is read."""

    file: str
    name: str
    """Of the episode within the file, for messages and for the row's `source`."""
    place: int = 0
    """Place in the file, as the format defines it: a byte offset, a number."""
    size_bytes: int
    """Bytes in the input; the size of the output is estimated from them."""
    error: DataError | None = None
    """Why it is bad, if that is known before it is read. It may then stand for all unreadable episodes of a file."""

    @property
    def source(self) -> str:
        """File and name, without the folders, which differ from host to host."""
        return f"{self.file.rpartition('/')[2]}:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One episode in memory."""

    rgb: NDArray[np.uint8]
    """[F, H, W, 3]."""
    actions: NDArray[np.float32]
    """[T, D]."""
    more_cameras: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """Name of the array in the NPZ (`camera_array`) -> frames [F, H, W, 3] of a further camera."""
    control_mode: str | None = None
    """What the numbers of an action mean, as ManiSkill calls it, e.g. pd_ee_delta_pose."""
    depth: NDArray[np.uint16] | None = None
    """[F, H, W] in mm."""
    states: NDArray[np.float32] | None = None
    """[T or T + 1, S], what the robot feels of itself, in the recording's units."""
    task: str | None = None
    """Task id, e.g. PushCube-v1."""
    success: bool | None = None
    """Whether it succeeded, where the recording says so."""
    instruction: str | None = None
    """Empty counts as missing: then the task decides the instruction."""

    def check(self, ref: EpisodeRef) -> None:
        """Raises DataError unless `mani_openpi` can read it."""
        for name, frames in {"rgb": self.rgb, **self.more_cameras}.items():
            if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
                raise _error(ref, name, f"frames {frames.dtype} {list(frames.shape)}: uint8 [F, H, W, 3] are expected")
            if len(frames) != len(self.rgb):
                raise _error(ref, name, f"{len(frames)} frames, and the first camera has {len(self.rgb)}")
        if self.actions.ndim != 2 or 0 in self.actions.shape:
            raise _error(
                ref, "actions", f"shape {list(self.actions.shape)}: [T, D] with at least one action is expected"
            )
        if not np.isfinite(self.actions).all():
            t, d = np.argwhere(~np.isfinite(self.actions))[0].tolist()
            raise _error(ref, f"actions[{t}][{d}]", f"{self.actions[t, d]} is not a finite 32-bit number")
        if len(self.rgb) not in (len(self.actions), len(self.actions) + 1):
            raise _error(
                ref,
                "actions",
                f"{len(self.rgb)} frames and {len(self.actions)} actions: as many frames, or one more, are expected",
            )
        if self.depth is not None and self.depth.shape != self.rgb.shape[:3]:
            raise _error(ref, "depth", f"shape {list(self.depth.shape)}, and the frames have {list(self.rgb.shape)}")
        if self.states is not None:
            self._check_states(self.states, ref)
        if self.instruction is not None and not self.instruction.strip() and self.task is None:
            raise _error(
                ref,
                "instruction",
                "an empty instruction: name a task id with --task, mend the data, or leave such episodes out with --skip-bad",
            )
        if self.instruction is None and self.task is None:
            raise _error(ref, "instruction", "neither an instruction nor a task id: give one with --task")

    def _check_states(self, states: NDArray[np.float32], ref: EpisodeRef) -> None:
        if states.ndim != 2 or 0 in states.shape or len(states) not in (len(self.actions), len(self.actions) + 1):
            raise _error(
                ref,
                "states",
                f"shape {list(states.shape)} and {len(self.actions)} actions: [T, S] with as many states, or one more, is "
                "expected",
            )
        if not np.isfinite(states).all():
            t, s = np.argwhere(~np.isfinite(states))[0].tolist()
            raise _error(ref, f"states[{t}][{s}]", f"{states[t, s]} is not a finite 32-bit number")


class EpisodeSource(Protocol):
    """One kind of input. Instances are made in every process from `options` alone."""

    def episodes(self) -> list[EpisodeRef]:
        """All episodes, in an order that depends on the names of files and on their content alone.

        A bad one is returned with its error, so that the others can be converted. Raises DataError and
        ConfigError for what concerns all of them.
        """

    def read(self, ref: EpisodeRef) -> Episode:
        """One episode that has no error yet. Raises DataError naming file, record and field."""

    def identity(self) -> Mapping[str, Any]:
        """Every setting that decides what `read` returns; JSON values."""


def _error(ref: EpisodeRef, field: str, reason: str) -> DataError:
    return DataError(reason, file=ref.file, record=ref.name, field=field)


def camera_array(name: str) -> str:
    """Name of the NPZ's array with the frames of a further camera; the first one's is `rgb`."""
    return f"rgb_{name}"


def check_episode_size(num_frames: int, frame_bytes: int) -> None:
    """Raises DataError before memory is asked for."""
    if num_frames * frame_bytes > MAX_EPISODE_BYTES:
        raise DataError(
            f"{num_frames} frames of {frame_bytes} bytes: more than {MAX_EPISODE_BYTES} bytes cannot be read by the loader; "
            "split the episode"
        )
