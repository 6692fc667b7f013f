"""A camera's frames of one trajectory, sample by sample: images with history, and no more frames alive than that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray


class FrameHistory:
    """One camera. Letters: T frames of the trajectory."""

    def __init__(self, frames: Iterator[NDArray[Any]], wanted: Sequence[int]) -> None:
        """frames: those of the timesteps `wanted` (rising), one after another."""
        self._frames, self._wanted = frames, iter(wanted)
        self._kept: dict[int, NDArray[Any]] = {}
        self._last = -1

    def at(self, timesteps: Sequence[int]) -> list[NDArray[Any]]:
        """The frame of each, oldest first. A later call may not ask for older ones than the first of this one."""
        if self._kept and next(iter(self._kept)) < timesteps[0]:  # they came in order
            self._kept = {t: frame for t, frame in self._kept.items() if t >= timesteps[0]}
        while self._last < timesteps[-1]:
            self._last = next(self._wanted)
            self._kept[self._last] = next(self._frames)
        return [self._kept[t] for t in timesteps]
