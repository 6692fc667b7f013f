"""Moments around a frame (`delta_timestamps`) -> positions in the episode, and which of them lie beyond its ends.

Of an episode of 3 frames at 10 fps, deltas 0 s and 0.1 s:

    frame     0       1       2
    index   0, 1    1, 2    2, 2
    is_pad  -, -    -, -    -, pad

The rule is lerobot's: what lies beyond the episode is clamped to its first or last frame, and marked.
Letters: T frames, K moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError

_TOLERANCE_S = 1e-4  # lerobot's


class Window(NamedTuple):
    """Where the moments of every frame lie."""

    positions: NDArray[np.int64]  # [T, K]
    is_pad: NDArray[np.bool_]  # [T, K]


def frame_offsets(deltas: Sequence[float], fps: float, key: str) -> NDArray[np.int64]:
    """int64[K] of seconds that are multiples of 1/fps within 0.1 ms. Raises ConfigError naming `key`."""
    seconds = np.asarray(deltas, np.float64)
    offsets = np.rint(seconds * fps)
    wrong = np.abs(offsets / fps - seconds) > _TOLERANCE_S
    if wrong.any():
        raise ConfigError(
            f"{key}: {float(seconds[wrong][0])} s is no multiple of 1/fps = {1 / fps:.6g} s, and between frames there is none"
        )
    return offsets.astype(np.int64)


def window(count: int, offsets: NDArray[np.int64]) -> Window:
    """Of every frame of an episode of `count` frames."""
    asked = np.arange(count)[:, None] + offsets
    return Window(np.clip(asked, 0, max(count - 1, 0)), (asked < 0) | (asked >= count))
