"""Frames -> bytes on the wire on a device: resize, jitter and JPEG of many frames at once, by torch.

    64 x uint8[480, 640, 3] --one copy--> device --two matrix products, rounding--> uint8[64, 3, 224, 224] --JPEG--> 64 x bytes

The rule is that of `stoker_proto.images.transport`. Resizing takes Pillow's weights as whole numbers (`resample_weights`), so the
pixels are the same on every device; they differ from those of the CPU's libraries by less than one level on average. Changes
of brightness, contrast and saturation are whole numbers too, and equal.

simplejpeg makes the JPEGs on the host. With `loader.jpeg: device` nvJPEG makes them on the device. torchvision lets it keep
colours at full resolution only, which a CPU loader halves.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import pybase64
import simplejpeg
from numpy.typing import NDArray

from loader_service.pieces.resample_weights import UNIT, resample_weights
from loader_service.sources.base import Sample
from stoker_proto.config import LoaderConfig
from stoker_proto.errors import ConfigError, HostError
from stoker_proto.images.augment import JitterFactors, crop_box, jitter_factors
from stoker_proto.images.geometry import operations_for
from stoker_proto.images.transport import ImageCoder, check_frame, grey_levels

ANY_DEVICE = "any device (loader.allow_mixed_devices)"
"""In place of the libraries' names, where loaders may differ."""
_MOST_FRAMES = 64
_MOST_BYTES = 96 << 20
"""Limits of what is uploaded at once. Its float32 copies take about ten times as much of the device's memory."""

Frame = NDArray[np.uint8] | NDArray[np.uint16]


class _Item(NamedTuple):
    """One frame on its way."""

    frame: Frame
    """Cropped already."""
    key: int | None
    """Of its augmentation."""
    is_depth: bool


class DeviceImages:
    """Frames -> bytes, for one model and one config. Used by several threads at once."""

    def __init__(self, coder: ImageCoder, loader: LoaderConfig) -> None:
        """loader: `device` is `cuda`, `cuda:1`, or `torch` for the same code on the CPU. Raises ConfigError without it."""
        device = loader.device
        self._torch = _import_torch(device)
        self._device = self._torch.device("cpu" if device == "torch" else device)
        self._coder = coder
        self._encoder = nvjpeg(loader)
        self._weights: dict[tuple[int, int], Any] = {}
        self._levels: Any = None
        self._local = threading.local()

    def encode_samples(
        self, samples: Iterable[tuple[Sample, int | None]]
    ) -> Iterator[tuple[Sample, tuple[bytes, ...]]]:
        """Each sample with its encoded frames, in order. samples: with the key of the augmentation, or None.

        Raises DataError for a frame of another shape or type."""
        waiting: list[tuple[Sample, list[_Item]]] = []
        num_frames = size = 0
        for sample, key in samples:
            items = [self._item(frame, key) for frame in sample.images]
            waiting.append((sample, items))
            num_frames += len(items)
            size += sum(item.frame.nbytes for item in items)
            if num_frames >= _MOST_FRAMES or size >= _MOST_BYTES:
                yield from self._encode_waiting(waiting)
                waiting, num_frames, size = [], 0, 0
        yield from self._encode_waiting(waiting)

    def encode_all(self, frames: Sequence[Frame], keys: Sequence[int | None]) -> list[bytes]:
        """The bytes of frames of any sizes: uint8[H, W, 3], or depth uint16[H, W] in mm. Raises DataError."""
        return self._encode([self._item(frame, key) for frame, key in zip(frames, keys, strict=True)])

    def _encode_waiting(
        self, waiting: Sequence[tuple[Sample, list[_Item]]]
    ) -> Iterator[tuple[Sample, tuple[bytes, ...]]]:
        images = iter(self._encode([item for _, items in waiting for item in items]))
        for sample, items in waiting:
            yield sample, tuple([next(images) for _ in items])

    def _item(self, frame: Frame, key: int | None) -> _Item:
        is_depth = check_frame(frame)
        augment = self._coder.augment
        if key is not None and augment.crop_area < 1:
            top, left, height, width = crop_box(frame.shape[0], frame.shape[1], augment.crop_area, key)
            frame = frame[top : top + height, left : left + width]
        return _Item(frame, key, is_depth)

    def _encode(self, items: Sequence[_Item]) -> list[bytes]:
        """Frames of the same size and kind go together, in chunks within the limits."""
        kinds: dict[tuple[int, ...], list[int]] = {}
        for number, item in enumerate(items):
            kinds.setdefault((*item.frame.shape, item.is_depth, item.key is None), []).append(number)
        found: dict[int, bytes] = {}
        for numbers in kinds.values():
            step = max(1, min(_MOST_FRAMES, _MOST_BYTES // items[numbers[0]].frame.nbytes))
            for start in range(0, len(numbers), step):
                chunk = numbers[start : start + step]
                found.update(zip(chunk, self._encode_alike([items[number] for number in chunk]), strict=True))
        return [found[number] for number in range(len(items))]

    def _encode_alike(self, items: Sequence[_Item]) -> list[bytes]:
        try:
            with self._torch.inference_mode(), self._stream():
                return self._to_bytes(self._pixels(items))
        except self._torch.OutOfMemoryError as error:  # after another error of CUDA the process is of no use: it ends
            raise HostError(
                f"{self._device}: {str(error).splitlines()[0]} Trouble of this device, no fault of the data"
            ) from error

    def _stream(self) -> AbstractContextManager[Any]:
        """A stream of this thread, so that threads do not wait for each other's work."""
        if self._device.type != "cuda":
            return nullcontext()
        if getattr(self._local, "stream", None) is None:
            self._local.stream = self._torch.cuda.Stream(self._device)
        stream: AbstractContextManager[Any] = self._torch.cuda.stream(self._local.stream)
        return stream

    def _pixels(self, items: Sequence[_Item]) -> Any:
        """uint8[N, 3, height, width] on the device. All frames have one size and kind."""
        torch, spec = self._torch, self._coder.spec
        stacked = np.stack([item.frame for item in items])
        if items[0].is_depth:
            levels = self._depth_levels()
            uploaded = torch.from_numpy(stacked.astype(np.int32)).to(self._device)  # torch cannot index by uint16
            pixels = levels[uploaded][:, None].expand(-1, 3, -1, -1)
        else:
            pixels = torch.from_numpy(stacked).to(self._device).permute(0, 3, 1, 2)
        for name, top, left, height, width in operations_for(spec.steps, *stacked.shape[1:3]):
            if name == "resize":
                pixels = self._resize(pixels, height, width)
            elif name == "crop":
                pixels = pixels[..., top : top + height, left : left + width]
            else:
                colour = torch.tensor(spec.pad_colour, dtype=torch.uint8, device=self._device)
                padded = colour[None, :, None, None].repeat(len(items), 1, height, width)
                padded[..., top : top + pixels.shape[2], left : left + pixels.shape[3]] = pixels
                pixels = padded
        if items[0].key is not None and not items[0].is_depth:
            factors = [jitter_factors(self._coder.augment, item.key) for item in items if item.key is not None]
            pixels = self._jitter(pixels, factors)
        return pixels.contiguous()

    def _resize(self, pixels: Any, height: int, width: int) -> Any:
        """All rows, then all columns; each is rounded to whole levels."""
        if pixels.shape[3] != width:
            weights = self._weights_of(pixels.shape[3], width)
            pixels = self._rounded(pixels.to(self._torch.float32) @ weights.T)
        if pixels.shape[2] != height:
            weights = self._weights_of(pixels.shape[2], height)
            pixels = self._rounded(weights @ pixels.to(self._torch.float32))
        return pixels

    def _rounded(self, sums: Any) -> Any:
        return ((sums + UNIT // 2) / UNIT).floor_().clamp_(0, 255).to(self._torch.uint8)

    def _weights_of(self, size: int, new_size: int) -> Any:
        key = size, new_size
        if key not in self._weights:
            if len(self._weights) >= 256:
                self._weights.clear()
            found = resample_weights(self._coder.spec.resample, size, new_size)
            self._weights[key] = self._torch.from_numpy(found.copy()).to(self._device)
        return self._weights[key]

    def _depth_levels(self) -> Any:
        if self._levels is None:
            self._levels = self._torch.from_numpy(grey_levels(self._coder.image.depth_max_mm).copy()).to(self._device)
        return self._levels

    def _jitter(self, pixels: Any, factors: Sequence[JitterFactors]) -> Any:
        """`stoker_proto.images.augment.jitter` of all frames."""
        torch = self._torch
        if all(one.is_identity for one in factors):
            return pixels

        def column(values: Sequence[int], dtype: Any) -> Any:
            return torch.tensor(values, dtype=dtype, device=self._device)[:, None, None]

        wide = pixels.to(torch.int32)
        grey = 77 * wide[:, 0] + 150 * wide[:, 1] + 29 * wide[:, 2]
        mean = grey.sum((1, 2), dtype=torch.int64) // (grey.shape[1] * grey.shape[2])
        scale = torch.tensor([one.of_mean for one in factors], dtype=torch.int64, device=self._device)
        constant = ((scale * mean) >> factors[0].mean_shift).to(torch.int32)[:, None, None]
        added = (grey >> 8) * column([one.of_grey for one in factors], torch.int32) + constant
        mixed = wide * column([one.of_pixel for one in factors], torch.int32)[:, None]
        mixed += (added + factors[0].half)[:, None]
        mixed >>= factors[0].bits
        jittered = mixed.clamp_(0, 255).to(torch.uint8)
        same = torch.tensor([one.is_identity for one in factors], device=self._device)
        return torch.where(same[:, None, None, None], pixels, jittered)

    def _to_bytes(self, pixels: Any) -> list[bytes]:
        coder = self._coder
        if coder.transport == "pixels":
            return [image.tobytes() for image in self._on_host(pixels)]
        if self._encoder is None:
            jpegs = [
                simplejpeg.encode_jpeg(image, quality=coder.image.quality, colorspace="RGB", colorsubsampling="420")
                for image in self._on_host(pixels)
            ]
        else:
            if self._device.type == "cuda":  # nvJPEG works on a stream of its own, which does not wait for ours
                self._torch.cuda.current_stream(self._device).synchronize()
            jpegs = [found.cpu().numpy().tobytes() for found in self._encoder(list(pixels), coder.image.quality)]
        return [pybase64.b64encode(jpeg) for jpeg in jpegs] if coder.transport == "base64" else jpegs

    def _on_host(self, pixels: Any) -> NDArray[np.uint8]:
        """uint8[N, height, width, 3], C-contiguous."""
        found: NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return found


def device_images(coder: ImageCoder | None, loader: LoaderConfig) -> DeviceImages | None:
    """What encodes frames on `loader.device`; None where the CPU's libraries do, or the model takes no images."""
    return None if coder is None or loader.device == "cpu" else DeviceImages(coder, loader)


def image_libraries(found: str, loader: LoaderConfig) -> str:
    """The fingerprint `image_libraries` of a loader with this device. found: that of the CPU's libraries, or "none"."""
    if found == "none":
        return found
    if loader.allow_mixed_devices:
        return ANY_DEVICE
    if loader.device == "cpu":
        return found
    torch = _import_torch(loader.device)
    if nvjpeg(loader) is None:
        return f"simplejpeg {version('simplejpeg')}, resize on torch 1"
    name = torch.cuda.get_device_name(loader.device)  # another device may round otherwise
    return f"nvjpeg of torchvision {version('torchvision')} on {name}, resize on torch 1"


def nvjpeg(loader: LoaderConfig) -> Any:
    """torchvision's encoder, (list of uint8[3, H, W] on the device, quality) -> list of uint8[bytes].

    None where simplejpeg encodes. Raises ConfigError."""
    if loader.jpeg == "host":
        return None
    if not loader.device.startswith("cuda"):
        raise ConfigError(f"loader.jpeg is device, and loader.device is {loader.device}: nvJPEG needs cuda")
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError("loader.jpeg is device: it needs torchvision, built for this torch; or set it to host")
    return importlib.import_module("torchvision.io").encode_jpeg


def _import_torch(device: str) -> Any:
    """torch, where it has the device. Raises ConfigError."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"loader.device is {device}: it needs torch; pip install 'stoker[gpu]', or set it to cpu")
    torch = importlib.import_module("torch")
    if device == "torch":
        return torch
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(device.partition(":")[2] or 0)
    if number >= count:
        raise ConfigError(
            f"loader.device is {device}: torch {torch.__version__} finds {count} CUDA devices here; check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, install a torch that is built for CUDA, or set loader.device to cpu"
        )
    torch.backends.cuda.matmul.allow_tf32 = False  # it would round the weights
    return torch
