"""Encoded images that claim absurd sizes: refused by their headers, before a pixel is allocated."""

from __future__ import annotations

import io
import resource
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from loader_service.convert.images import decode_image
from stoker_proto.errors import DataError

FRAME = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)


def jpeg(height: int, width: int) -> bytes:
    """A JPEG of 16 x 24 whose frame header says otherwise."""
    good: bytes = simplejpeg.encode_jpeg(FRAME)
    at = good.index(b"\xff\xc0") + 5  # after marker, length and precision
    return good[:at] + struct.pack(">HH", height, width) + good[at + 4 :]


def png(height: int, width: int) -> bytes:
    """A PNG of 16 x 24 whose IHDR says otherwise, with the right checksum."""
    buffer = io.BytesIO()
    Image.fromarray(FRAME).save(buffer, "PNG")
    good = buffer.getvalue()
    header = b"IHDR" + struct.pack(">LL", width, height) + good[24:29]
    return good[:12] + header + struct.pack(">L", zlib.crc32(header)) + good[33:]


def test_the_makers_make_what_they_say() -> None:
    np.testing.assert_array_equal(decode_image(png(16, 24)), FRAME)
    assert decode_image(jpeg(16, 24)).shape == (16, 24, 3)


def test_depth_of_16_bits_is_no_colour_frame() -> None:
    """Pillow would make it white."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 1200, np.uint16)).save(buffer, "PNG")
    with pytest.raises(DataError, match=r"grey of more than 8 bits \(mode I;16\)"):
        decode_image(buffer.getvalue())


@pytest.mark.parametrize("make", [jpeg, png])
@pytest.mark.parametrize(("height", "width"), [(65_500, 65_500), (9_000, 9_000), (1_100, 65_000)])
def test_absurd_sizes_are_refused(make: object, height: int, width: int) -> None:
    data = make(height, width)  # type: ignore[operator]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"an image (of \d+ x \d+ pixels|that cannot be decoded)") as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "in KiB"
