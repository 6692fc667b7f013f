"""What an image costs on this host with each `data.image.transport`: for the log of a run with `auto`."""

from __future__ import annotations

import dataclasses
import logging
import time

import numpy as np

from stoker_proto.config import AugmentConfig, ImageConfig
from stoker_proto.images.spec import ImageSpec
from stoker_proto.images.transport import ImageCoder

_TRANSPORTS = ("base64", "jpeg", "pixels")
_ROUNDS = 9


def log_choice(logger: logging.Logger, image: ImageConfig, spec: ImageSpec | None) -> None:
    """Say what `auto` is and what it costs. Does nothing where the config names a transport, or the model takes no images."""
    if image.transport != "auto" or spec is None:
        return
    costs = "; ".join(
        f"{name} {encode:.2f} + {decode:.2f} ms, {size / 1000:.0f} KB"
        for name, (encode, decode, size) in measure(image, spec).items()
    )
    logger.info(
        "data.image.transport: auto is %s, the cheapest that trains the same pixels as base64. CPU of an image of %d x %d here "
        "(loader + rank) and its size: %s. Pixels are lossless, so they would train other values: name them to get them",
        image.resolved().transport,
        spec.height,
        spec.width,
        costs,
    )


def measure(image: ImageConfig, spec: ImageSpec) -> dict[str, tuple[float, float, int]]:
    """Transport -> (CPU ms to encode, CPU ms to decode, bytes) of one image of the model's size: the medians of a few rounds."""
    frame, out = _frame(spec.height, spec.width), np.empty((spec.height, spec.width, 3), np.uint8)
    coders = {
        name: ImageCoder(spec, dataclasses.replace(image, transport=name), AugmentConfig())  # type: ignore[arg-type]
        for name in _TRANSPORTS
    }
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in coders}
    for _ in range(_ROUNDS):  # interleaved, as the host may be busy with other things for a while
        for name, coder in coders.items():
            began = time.thread_time_ns()
            data = coder.to_bytes(frame)
            encoded = time.thread_time_ns()
            coder.decode(data, out)
            found[name].append((encoded - began, time.thread_time_ns() - encoded, len(data)))
    return {
        name: (float(np.median(encode)) / 1e6, float(np.median(decode)) / 1e6, sizes[0])
        for name, rounds in found.items()
        for encode, decode, sizes in [tuple(zip(*rounds, strict=True))]
    }


def _frame(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A picture with edges, gradients and a little noise, about as large in JPEG as a rendered frame."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 8, (height, width))
    levels = [rows * 200 // height, columns * 200 // width, (rows // 32 + columns // 32) % 2 * 180]
    return np.stack([level + noise for level in levels], axis=-1).astype(np.uint8)
