"""Random changes of a training image, each a pure function of a 64-bit key. They use whole numbers, so all machines agree.

A crop keeps `crop_area` of the frame and its aspect ratio; the model's resize then scales it to the model's size. After that
brightness, contrast and saturation are scaled by factors in [1 - value, 1 + value]. One after the other they are

    x1 = b x        x2 = s x1 + (1 - s) grey(x1)        x3 = c x2 + (1 - c) mean(grey(x2))

which equals one sum, rounded and clipped once:  x3 = c s b x + c (1 - s) b grey(x) + (1 - c) b mean(grey(x)).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stoker_proto.config import AugmentConfig
from stoker_proto.hashing import keyed_hashes

Pixels = NDArray[np.uint8]

_UNIT = 1 << 10  # fixed point of a factor
_BITS = 12  # fixed point of a product of factors: 255 * 8 << 12 stays inside int32
_RED, _GREEN, _BLUE = 77, 150, 29  # of 256: the weights of ITU-R BT.601


def crop_box(height: int, width: int, area: float, key: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the part of a frame to keep, in pixels."""
    side = math.sqrt(area)
    kept_height, kept_width = max(1, round(height * side)), max(1, round(width * side))
    down, right = (int(value) for value in keyed_hashes(2, key))
    return down % (height - kept_height + 1), right % (width - kept_width + 1), kept_height, kept_width


class JitterFactors(NamedTuple):
    """The sum that changes an image, in fixed point: (of_pixel x + of_grey (grey(x) >> 8) + constant + half) >> bits.

    grey is 77 red + 150 green + 29 blue; constant is (of_mean * mean(grey)) >> mean_shift, with the mean rounded down."""

    of_pixel: int
    of_grey: int
    of_mean: int
    bits: int = _BITS
    mean_shift: int = 28 - _BITS  # 28: two factors and the mean's 256
    half: int = 1 << (_BITS - 1)

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.of_pixel == 1 << _BITS and self.of_grey == self.of_mean == 0


def jitter_factors(config: AugmentConfig, key: int) -> JitterFactors:
    """The changes that this key determines."""
    hashes = keyed_hashes(5, key)[2:]  # the first two are the crop's
    brightness, contrast, saturation = (
        _factor(value, int(number))
        for value, number in zip((config.brightness, config.contrast, config.saturation), hashes, strict=True)
    )
    shift = 30 - _BITS
    return JitterFactors(
        of_pixel=(contrast * saturation * brightness) >> shift,
        of_grey=(contrast * (_UNIT - saturation) * brightness) >> shift,
        of_mean=(_UNIT - contrast) * brightness,
    )


def jitter(pixels: Pixels, config: AugmentConfig, key: int) -> Pixels:
    """uint8[H, W, 3] with changed brightness, contrast and saturation. The input is not modified."""
    factors = jitter_factors(config, key)
    if factors.is_identity:
        return pixels
    if not (factors.of_grey or factors.of_mean):  # brightness alone: each value has one result
        table = (np.arange(256, dtype=np.int32) * factors.of_pixel + factors.half) >> factors.bits
        changed = bytearray(pixels.tobytes()).translate(np.clip(table, 0, 255).astype(np.uint8).tobytes())
        return np.frombuffer(changed, np.uint8).reshape(pixels.shape)
    grey = _RED * pixels[..., 0].astype(np.int32)  # int32[H, W], times 256
    grey += _GREEN * pixels[..., 1].astype(np.int32)
    grey += _BLUE * pixels[..., 2].astype(np.int32)
    mean = int(grey.sum(dtype=np.int64)) // grey.size
    constant = (factors.of_mean * mean) >> factors.mean_shift
    mixed = pixels * np.int32(factors.of_pixel)
    if factors.of_grey:
        grey >>= 8
        grey *= factors.of_grey
        grey += constant + factors.half
        mixed += grey[..., None]
    else:
        mixed += constant + factors.half
    mixed >>= factors.bits
    np.clip(mixed, 0, 255, out=mixed)
    return mixed.astype(np.uint8)


def _factor(largest_change: float, number: int) -> int:
    """A factor in [1 - change, 1 + change], times 1024."""
    change = round(largest_change * _UNIT)
    return _UNIT - change + number % (2 * change + 1)
