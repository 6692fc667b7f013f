"""One trajectory -> its samples: images with history, the state, and a chunk of actions for each timestep.

A trajectory of 3 frames at 10 fps, moments 0 s and 0.1 s after each frame:

    frame       0       1       2
    positions   0, 1    1, 2    2, 2
    is_pad      -, -    -, -    -, pad

Positions beyond the trajectory are clamped to its first or last frame, and marked: lerobot's rule, and `mani_openpi`'s too.

Letters: T timesteps, D dimensions of an action, S numbers of a state, K actions in a chunk (or moments), N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.actions import is_noop
from loader_service.sources.base import NamedFiles, Sample
from stoker_proto.errors import ConfigError

_TOLERANCE_S = 1e-4  # lerobot's


class Moments(NamedTuple):
    """Where the moments around every frame lie."""

    positions: NDArray[np.int64]  # [T, K]
    is_pad: NDArray[np.bool_]  # [T, K]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What is known of a trajectory before its frames are decoded."""

    actions: NDArray[np.float32]
    """[T, D]."""
    states: NDArray[np.float32] | None
    """[T or T + 1, S]."""
    instructions: Sequence[str]
    """[T]."""
    drop_noops: bool
    """Timesteps that move nothing are no samples, and no chunk holds them (`data.action.drop_noops`)."""
    chunk_offsets: NDArray[np.int64]
    """[K]: which actions, counted from a sample's own, are its chunk."""
    history_offsets: NDArray[np.int64]
    """[H], rising: which frames, counted from a sample's own, are its images of each camera."""
    files: NamedFiles | None = None
    """The files that hold the frames."""

    def samples(self, open_cameras: Callable[[list[int]], Sequence[Iterator[NDArray[Any]]]]) -> Iterator[Sample]:
        """The samples in the order of time.

        open_cameras: (timesteps, rising) -> for each camera the frames of these timesteps, decoded one after another.
        """
        count = len(self.actions)
        kept = np.flatnonzero(~is_noop(self.actions)) if self.drop_noops else np.arange(count)  # [N]
        chunks, actions_are_pad = moments(len(kept), self.chunk_offsets)  # [N, K], of the kept actions
        chunk_actions = self.actions[kept[chunks]]  # [N, K, D]
        history = moments(count, self.history_offsets).positions  # [T, H]
        wanted: list[int] = np.unique(history[kept]).tolist()
        cameras = open_cameras(wanted)
        own_frames = self.history_offsets.tolist() == [0]
        images = zip(*cameras, strict=False) if cameras and own_frames else _histories(cameras, wanted, history[kept])
        for i, (t, frames) in enumerate(zip(kept.tolist(), images, strict=False)):
            yield Sample(
                instruction=self.instructions[t],
                images=frames,
                state=None if self.states is None else self.states[t],
                action=chunk_actions[i],
                action_is_pad=actions_are_pad[i],
                timestep=t,
                files=self.files,
            )


def _histories(
    cameras: Sequence[Iterator[NDArray[Any]]], wanted: Sequence[int], history: NDArray[np.int64]
) -> Iterator[tuple[NDArray[Any], ...]]:
    """The images of each sample: of each camera the frames of its history. history: [N, H], timesteps of them."""
    histories = [FrameHistory(frames, wanted) for frames in cameras]
    for timesteps in history.tolist():
        yield tuple([image for camera in histories for image in camera.at(timesteps)])


class FrameHistory:
    """Frames of one camera, sample by sample; it holds no more of them than a sample's history needs."""

    def __init__(self, frames: Iterator[NDArray[Any]], timesteps: Sequence[int]) -> None:
        """frames: those of these timesteps (rising), one after another."""
        self._frames, self._timesteps = frames, iter(timesteps)
        self._kept: dict[int, NDArray[Any]] = {}
        self._last = -1

    def at(self, timesteps: Sequence[int]) -> list[NDArray[Any]]:
        """The frame of each timestep, oldest first. A later call may not ask for older ones than the first of this call."""
        if self._kept and next(iter(self._kept)) < timesteps[0]:  # they came in order
            self._kept = {t: frame for t, frame in self._kept.items() if t >= timesteps[0]}
        while self._last < timesteps[-1]:
            self._last = next(self._timesteps)
            self._kept[self._last] = next(self._frames)
        return [self._kept[t] for t in timesteps]


def moments(count: int, offsets: NDArray[np.int64]) -> Moments:
    """Positions of the moments at these offsets, int64[K] in frames, around every frame of a trajectory of `count` frames."""
    asked = np.arange(count)[:, None] + offsets
    return Moments(np.clip(asked, 0, max(count - 1, 0)), (asked < 0) | (asked >= count))


def frame_offsets(deltas: Sequence[float], fps: float, key: str) -> NDArray[np.int64]:
    """int64[K] frames of seconds that are multiples of 1/fps within 0.1 ms. Raises ConfigError naming `key`."""
    seconds = np.asarray(deltas, np.float64)
    offsets = np.rint(seconds * fps)
    wrong = np.abs(offsets / fps - seconds) > _TOLERANCE_S
    if wrong.any():
        raise ConfigError(
            f"{key}: {float(seconds[wrong][0])} s is no multiple of 1/fps = {1 / fps:.6g} s, and between frames there is none"
        )
    return offsets.astype(np.int64)
