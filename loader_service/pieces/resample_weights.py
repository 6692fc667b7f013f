"""Weights of Pillow's antialiased filters, as whole numbers: one row per output pixel.

    resample_weights("bicubic", 640, 224)  ->  float32[224, 640], each row adds up to 16,384

Weights are multiples of 1/16,384, so each product of a weight and a pixel, and each sum of them, is a whole number below 2**24.
float32 holds such numbers exactly. So the result is the same on every device and in every order of summation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stoker_proto.images.spec import Resample

UNIT = 1 << 14
"""What the weights of one output pixel add up to."""


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0


def _lanczos(x: float) -> float:
    return float(np.sinc(x) * np.sinc(x / 3.0)) if abs(x) < 3.0 else 0.0


_FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
"""Name -> (the filter, how far it reaches)."""


@lru_cache(maxsize=256)
def resample_weights(resample: Resample, size: int, new_size: int) -> NDArray[np.float32]:
    """float32[new_size, size]: how much of each input pixel an output pixel takes, times `UNIT`. Read-only."""
    function, reach = _FILTERS[resample]
    scale = size / new_size
    stretch = max(scale, 1.0)  # smaller output: a wider filter, so that no pixel is left out
    weights = np.zeros((new_size, size), np.float32)
    for place in range(new_size):
        centre = (place + 0.5) * scale
        first = max(int(centre - reach * stretch + 0.5), 0)
        last = min(int(centre + reach * stretch + 0.5), size)
        found = np.array([function((x - centre + 0.5) / stretch) for x in range(first, last)])
        whole = np.rint(found / found.sum() * UNIT).astype(np.int64)
        whole[int(np.argmax(whole))] += UNIT - int(whole.sum())  # the rounding errors, where they matter least
        weights[place, first:last] = whole
    assert float(np.abs(weights).sum(1).max()) * 255 < 1 << 24
    weights.flags.writeable = False
    return weights
