"""A camera frame -> the model's pixels -> the bytes on the wire, and back.

    uint8[480, 640, 3] --crop, resize as the model's processor, jitter--> uint8[224, 224, 3] --JPEG 4:2:0, Base64--> b"/9j/4A..."

`transport`: base64 (of a JPEG), jpeg, or pixels (raw RGB bytes, lossless).
"""

from __future__ import annotations

import binascii
from functools import cache
from importlib.metadata import version

import numpy as np
import pybase64
import simplejpeg
from numpy.typing import NDArray

from stoker_proto.config import AugmentConfig, ImageConfig
from stoker_proto.errors import DataError, RemoteProtocolError
from stoker_proto.host.stages import ENCODE, RESIZE, switch
from stoker_proto.images.augment import crop_box, jitter
from stoker_proto.images.geometry import Operation, operations_for
from stoker_proto.images.resize import best_resize
from stoker_proto.images.spec import ImageSpec

Pixels = NDArray[np.uint8]
_MAX_SIZES = 1024


def depth_to_rgb(depth: NDArray[np.uint16], max_mm: int) -> Pixels:
    """Depth in mm, uint16[H, W] -> grey uint8[H, W, 3]: linear, 0 mm (no reading) is black, max_mm and beyond are white.

    One level is max_mm / 255 (7.8 mm for 2,000). Grey, because a JPEG would destroy depth packed into bits.
    """
    return np.repeat(grey_levels(max_mm).take(depth), 3).reshape(*depth.shape, 3)


@cache
def grey_levels(max_mm: int) -> Pixels:
    """uint8[65536]: the grey level of each depth in mm, rounded."""
    depth = np.minimum(np.arange(1 << 16, dtype=np.int64), max_mm)
    return ((depth * 255 + max_mm // 2) // max_mm).astype(np.uint8)


def check_frame(frame: NDArray[np.uint8] | NDArray[np.uint16]) -> bool:
    """Whether it is depth, uint16[H, W], and not colour, uint8[H, W, 3]. Raises DataError for anything else."""
    is_depth = frame.ndim == 2 and frame.dtype == np.uint16
    if not is_depth and (frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8):
        raise DataError(
            f"a frame is {frame.dtype}{list(frame.shape)}: uint8[H, W, 3] or depth uint16[H, W] is expected"
        )
    if frame.size == 0:
        raise DataError(f"a frame is empty: {list(frame.shape)}")
    return is_depth


class ImageCoder:
    """Frames <-> bytes on the wire, for one model and one config. Safe to use from many threads."""

    def __init__(self, spec: ImageSpec, image: ImageConfig, augment: AugmentConfig) -> None:
        self.spec, self.image, self.augment = spec, image.resolved(), augment
        self.transport = self.image.transport
        self._quality = image.quality
        self._resize, self._resizer_name = best_resize()
        self._operations: dict[tuple[int, ...], tuple[Operation, ...]] = {}
        self._shape = (spec.height, spec.width, 3)
        self._num_bytes = spec.height * spec.width * 3

    @property
    def libraries(self) -> str:
        """Names and versions of the libraries that determine the exact bytes."""
        return f"simplejpeg {version('simplejpeg')}, {self._resizer_name}"

    def encode(self, frame: NDArray[np.uint8] | NDArray[np.uint16], augment_key: int | None) -> bytes:
        """The bytes of a frame, uint8[H, W, 3] or depth uint16[H, W] in mm. Raises DataError for another shape or type.

        augment_key: 64 bits that determine the augmentation; None: no augmentation. With the same key a depth frame gets the
        crop of its colour frame; its levels stay.
        """
        before = switch(ENCODE)
        data = self.to_bytes(self.pixels(frame, augment_key))
        switch(before)
        return data

    def to_bytes(self, pixels: Pixels) -> bytes:
        """The bytes of the model's pixels, C-contiguous uint8[height, width, 3]."""
        if self.transport == "pixels":
            return pixels.tobytes()
        jpeg: bytes = simplejpeg.encode_jpeg(pixels, quality=self._quality, colorspace="RGB", colorsubsampling="420")
        return pybase64.b64encode(jpeg) if self.transport == "base64" else jpeg

    def pixels(self, frame: NDArray[np.uint8] | NDArray[np.uint16], augment_key: int | None) -> Pixels:
        """The model's pixels, C-contiguous uint8[height, width, 3]; the frame itself where nothing changes. Raises DataError."""
        is_depth = check_frame(frame)
        if augment_key is None and not is_depth and not self._operations_for(frame.shape[:2]):
            return np.ascontiguousarray(frame, np.uint8)
        before = switch(RESIZE)
        if augment_key is not None and self.augment.crop_area < 1:
            top, left, height, width = crop_box(frame.shape[0], frame.shape[1], self.augment.crop_area, augment_key)
            frame = frame[top : top + height, left : left + width]
        pixels = depth_to_rgb(frame, self.image.depth_max_mm) if is_depth else frame  # type: ignore[arg-type]
        pixels = self._fit(pixels)  # type: ignore[arg-type]  # not depth: uint8, see above
        if augment_key is not None and not is_depth:
            pixels = jitter(pixels, self.augment, augment_key)
        switch(before)
        return np.ascontiguousarray(pixels)

    def decode(self, data: bytes | memoryview, out: Pixels) -> None:
        """Write the image in the bytes `data` into `out`, C-contiguous uint8[height, width, 3].

        Raises RemoteProtocolError for anything but an image of exactly this size. Allocates nothing larger.
        """
        if out.shape != self._shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype}{list(out.shape)}: C-contiguous uint8{list(self._shape)} is expected")
        if self.transport == "pixels":
            if len(data) != self._num_bytes:
                raise RemoteProtocolError(f"an image of {len(data)} bytes: {self._num_bytes} pixel bytes are expected")
            out[...] = np.frombuffer(data, np.uint8).reshape(self._shape)
            return
        if len(data) > 4 * self._num_bytes + 65536:
            raise RemoteProtocolError(f"an image of {len(data)} bytes for {self._num_bytes} bytes of pixels")
        try:
            jpeg = pybase64.b64decode(data, validate=True) if self.transport == "base64" else data
            self._decode_jpeg(jpeg, out)
        except (ValueError, binascii.Error) as error:
            raise RemoteProtocolError(f"an image is no {self.transport}: {error}") from error

    def _decode_jpeg(self, jpeg: bytes | memoryview, out: Pixels) -> None:
        """Raises ValueError for what is no JPEG, RemoteProtocolError for another size."""
        try:
            size = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=out).shape[:2]
        except ValueError:  # before it decodes, where the image is larger than `out`
            size = simplejpeg.decode_jpeg_header(jpeg)[:2]
            if size == self._shape[:2]:
                raise
        if size != self._shape[:2]:
            raise RemoteProtocolError(
                f"an image of {size[0]} x {size[1]}: {self._shape[0]} x {self._shape[1]} is expected"
            )

    def _operations_for(self, size: tuple[int, ...]) -> tuple[Operation, ...]:
        """What is done with a frame of this (height, width); nothing if it fits the model as it is."""
        operations = self._operations.get(size)
        if operations is None:
            if len(self._operations) >= _MAX_SIZES:
                self._operations.clear()
            operations = self._operations[size] = operations_for(self.spec.steps, *size)
        return operations

    def _fit(self, pixels: Pixels) -> Pixels:
        """Pad, resize and crop as the model's own processor does."""
        for name, top, left, height, width in self._operations_for(pixels.shape[:2]):
            if name == "resize":
                pixels = self._resize(pixels, height, width, self.spec.resample)
            elif name == "crop":
                pixels = pixels[top : top + height, left : left + width]
            else:
                padded = np.empty((height, width, 3), np.uint8)
                padded[...] = self.spec.pad_colour
                padded[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
                pixels = padded
        return pixels
