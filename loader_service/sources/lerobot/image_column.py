"""Frames that stand in the data file itself: struct<bytes: binary, path: string>, a PNG or JPEG each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loader_service.paths import resolve_inside
from loader_service.sources.lerobot.files import Files
from stoker_proto.errors import DataError
from stoker_proto.host.files import read_regular
from stoker_proto.host.stages import DECODE, switch
from stoker_proto.host.trouble import check_host

MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Where the files lie that cells without bytes name."""

    root: str
    """What their paths are relative to."""
    data_root: str
    """Nothing outside of it is read."""
    files: Files


def decode_image(value: object, size: tuple[int, int], place: ImagePlace) -> NDArray[np.uint8]:
    """uint8[H, W, 3] of one cell; a cell without bytes names a file. Raises DataError."""
    if not isinstance(value, dict) or not {"bytes", "path"} <= value.keys():
        raise DataError("a struct of bytes and path is expected")
    encoded = value["bytes"]
    if encoded is None:
        path = resolve_inside(value["path"], base=place.root, root=place.data_root, field="path")
        try:
            encoded = read_regular(place.files.local(Path(path)), MAX_FILE_BYTES)
        except OSError as error:
            check_host(error, path)
            raise DataError(f"{path} cannot be read ({error.strerror})") from error
    before = switch(DECODE)
    try:
        with Image.open(BytesIO(encoded), formats=("PNG", "JPEG")) as image:
            if (image.height, image.width) != size or image.mode != "RGB":
                raise DataError(
                    f"{image.height}x{image.width} pixels (height x width) of mode {image.mode}, and info.json says "
                    f"{size[0]}x{size[1]} and 3 channels"
                )
            pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        check_host(error, "an image")  # Pillow imports what decodes it
        raise DataError(f"an image that cannot be read ({error})") from error
    switch(before)
    return pixels


def image_frames(
    cells: Iterator[object], wanted: list[int], size: tuple[int, int], *, key: str, place: ImagePlace
) -> Iterator[NDArray[np.uint8]]:
    """Frames of the rows `wanted` (rising) of an episode, from the cells of all its rows."""
    left = iter(wanted)
    target = next(left, None)
    for t, cell in enumerate(cells):
        if target is None:
            return
        if t == target:
            try:
                yield decode_image(cell, size, place)
            except DataError as error:
                raise DataError(error.reason, field=f"{key}[{t}]") from error
            target = next(left, None)
