"""Encoded images -> uint8 frames. The size that a file claims is looked at before it is decoded."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from loader_service.convert.episode import check_episode_size
from loader_service.sources.pictures import refuse_deep_grey
from stoker_proto.errors import DataError

MAX_PIXELS = 64 << 20
"""Of one frame."""
MAX_ENCODED_BYTES = 256 << 20


def decode_frames(encoded: Sequence[bytes | memoryview], field: str) -> NDArray[np.uint8]:
    """uint8[F, H, W, 3] from JPEG, PNG or whatever Pillow reads, all of one size. Raises DataError(field=...)."""
    frames: NDArray[np.uint8] | None = None
    for number, data in enumerate(encoded):
        try:
            frame = decode_image(data)
            if frames is None:
                check_episode_size(len(encoded), frame.nbytes)
                frames = np.empty((len(encoded), *frame.shape), np.uint8)
            if frame.shape != frames.shape[1:]:
                raise DataError(
                    f"an image of {list(frame.shape)} after images of {list(frames.shape[1:])}: one size is needed"
                )
        except DataError as error:
            raise DataError(error.reason, field=f"{field}[{number}]") from error
        frames[number] = frame
    if frames is None:
        raise DataError("no image", field=field)
    return frames


def decode_image(data: bytes | memoryview) -> NDArray[np.uint8]:
    """uint8[H, W, 3]. Raises DataError."""
    if not 0 < len(data) <= MAX_ENCODED_BYTES:
        raise DataError(f"an encoded image of {len(data)} bytes: 1 to {MAX_ENCODED_BYTES} are expected")
    data = bytes(data)
    try:
        if data[:2] == b"\xff\xd8":
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            check_pixels(width, height)
            frame: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
            return frame
        with Image.open(io.BytesIO(data)) as image:
            check_pixels(*image.size)
            refuse_deep_grey(image)
            return np.array(image.convert("RGB"))
    except (
        ValueError,
        OSError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise DataError(f"an image that cannot be decoded ({error}): copy the file again") from error


def check_pixels(width: int, height: int) -> None:
    """Raises DataError for an image that is too large to be a frame."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise DataError(f"an image of {width} x {height} pixels: 1 to {MAX_PIXELS} are read")
