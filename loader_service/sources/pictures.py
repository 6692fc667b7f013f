"""What Pillow makes of an image file that is not plain 8-bit RGB, so that no picture becomes another one in silence.

I;16, I, F      grey of 16 or 32 bits: Pillow's `convert("RGB")` makes white of every number above 255; refused
orientation     a note in EXIF: cameras store a turned picture as the sensor saw it; it is turned as viewers do
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stoker_proto.errors import DataError
from stoker_proto.host.trouble import check_host

_ORIENTATION = 0x0112  # EXIF 2.3, 4.6.4
_APP1, _EXIF, _EXIF_WITHIN = b"\xff\xe1", b"Exif\0\0", 1 << 16
"""Marker, length (2 bytes) and this text begin the segment of EXIF, one of the first in a JPEG."""


def to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """uint8[H, W, 3] of an opened image file, the right way up. Raises DataError for grey of more than 8 bits."""
    refuse_deep_grey(picture)
    picture.load()  # what is damaged shows here, not where EXIF is read
    orientation = _orientation(picture.getexif)
    return upright(np.array(picture.convert("RGB")), orientation)


def refuse_deep_grey(picture: Image.Image) -> None:
    """Raises DataError for grey of more than 8 bits, such as depth."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        raise DataError(
            f"grey of more than 8 bits (mode {picture.mode}): numbers above 255 would all become white; write it with 8 bits"
        )


def orientation_of_jpeg(data: bytes) -> int:
    """How EXIF says that the picture lies, 1 to 8; 1: as stored, and where it says nothing."""
    start = data.find(_EXIF, 0, _EXIF_WITHIN)
    if start < 0 or data[start - 4 : start - 2] != _APP1:
        return 1  # nearly always, and found in microseconds

    def read() -> Image.Exif:
        exif = Image.Exif()
        exif.load(data[start : start - 2 + int.from_bytes(data[start - 2 : start], "big")])
        return exif

    return _orientation(read)


def _orientation(read: Callable[[], Image.Exif]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF
            value = read().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, KeyError, TypeError, struct.error) as error:
        check_host(error, "an image")
        return 1  # damaged EXIF says nothing, and the picture beside it is whole: viewers show it as it is stored
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """uint8[H, W, 3] or [W, H, 3], C-contiguous: the picture of this orientation turned as Pillow's `exif_transpose` does."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
