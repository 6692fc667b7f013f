"""Images that a row names or carries -> frames: a path below the data root, a data URI, or {"bytes": ..., "path": ...}."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pybase64
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from loader_service.paths import resolve_inside
from loader_service.sources.half_characters import refuse_half
from loader_service.sources.pictures import orientation_of_jpeg, to_rgb, upright
from stoker_proto.errors import DataError, located
from stoker_proto.host.files import read_regular
from stoker_proto.host.lfs import REASON, is_pointer
from stoker_proto.host.stages import DECODE, switch
from stoker_proto.host.trouble import check_host

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 50_000_000
_PLUGINS = {"JPEG": "Jpeg", "PNG": "Png", "WEBP": "WebP", "GIF": "Gif", "BMP": "Bmp"}
"""Format -> Pillow's module for it."""
_FORMATS = tuple(_PLUGINS)
_JPEG_MAGIC = b"\xff\xd8\xff"


def load_frame(
    image: Any, *, base: Path, root: str | None, field: str, local: Callable[[Path], Path] | None = None
) -> NDArray[np.uint8]:
    """uint8[H, W, 3]. base: folder that paths are relative to; root: nothing outside of it is read, default: base; local: brings
    the file there (`BaseSFTDataset.local`).

    Raises DataError with the field, and with the file where there is one."""
    path = ""
    if isinstance(image, dict):
        data, path_value = image.get("bytes"), image.get("path")
        image = data if data is not None else path_value
    refuse_half(image, field)
    if isinstance(image, str) and image.startswith("data:"):
        image = _from_uri(image, field)
    elif isinstance(image, str) and image.partition("://")[0] in ("http", "https"):
        raise DataError(
            f"{image[:80]!r}: nothing is fetched while training; store the image beside the data", field=field
        )
    elif isinstance(image, str):
        path = resolve_inside(image.removeprefix("file://"), base=str(base), root=root or str(base), field=field)
        image = _read_file(path if local is None else str(local(Path(path))))
        if is_pointer(image):
            raise DataError(REASON, file=path)
    if not isinstance(image, bytes):
        raise DataError(f"{type(image).__name__}: a path, a data URI or {{bytes, path}} is expected", field=field)
    before = switch(DECODE)
    with located(file=path, field="" if path else field):
        pixels = decode_image(image)
    switch(before)
    return pixels


def preload() -> None:
    """Import what decodes these formats: Pillow does it when the first one comes, and leaves out for good what fails then."""
    Image.preinit()
    for name in _PLUGINS.values():
        importlib.import_module(f"PIL.{name}ImagePlugin")


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """uint8[H, W, 3] of an image file's bytes, the right way up (EXIF), of a size that was checked before memory was asked for.

    Raises DataError."""
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"an image of {len(data)} bytes: at most {MAX_FILE_BYTES} are read")
    try:
        if data.startswith(_JPEG_MAGIC) and (pixels := _decode_jpeg(data)) is not None:
            return pixels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own limit is a warning, and lower than ours
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                _check_size(*picture.size)
                return to_rgb(picture)
    except (ValueError, OSError, SyntaxError, EOFError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        check_host(error, "an image")  # Pillow imports what decodes it
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"no readable image ({reason}): {', '.join(_FORMATS)} are read") from error


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """The quick way for the usual JPEG; None for others (CMYK, odd subsampling, damaged)."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if colours in ("CMYK", "YCCK"):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None
    orientation = orientation_of_jpeg(data)
    return pixels if orientation == 1 else upright(pixels, orientation)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"an image of {width} x {height} pixels: at most {MAX_PIXELS} are read; make it smaller")


def _from_uri(uri: str, field: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(f"{uri[:40]!r}: data:image/...;base64,... is expected", field=field)
    try:
        return bytes(pybase64.b64decode(body, validate=True))
    except ValueError as error:
        raise DataError(f"a data URI that is no Base64 ({error})", field=field) from error


def _read_file(path: str) -> bytes:
    try:
        return read_regular(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise DataError("there is no such file: copy it there, or correct the row that names it", file=path) from None
    except OSError as error:
        check_host(error, path)
        raise DataError(f"an image is expected ({error.strerror}): correct the row that names it", file=path) from error
