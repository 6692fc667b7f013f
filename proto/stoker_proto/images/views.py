"""Several images out of one camera frame: fixed crops, and crops around the projected hand (`data.options.views`).

    [{crop: [0, 48, 224, 160]}, {hand: [96, 96]}]      top, left, height, width; height, width: pixels of the camera frame

    frame uint8[256, 256, 3]  ->  uint8[224, 160, 3], uint8[96, 96, 3]

Afterwards each image takes the model's own steps (resize, crop). A crop around the hand has the hand's pixel in its middle;
what lies outside the frame is black. The hand's pixel is the projection of the tool centre point:

    [u, v, w] = intrinsic_cv @ extrinsic_cv @ [x, y, z, 1]         column u / w, row v / w, rounded half up

Loader and policy use this one function, so that a policy sees what was trained. The sums are in float64, in a fixed order, on
the float32 numbers of the dataset, so the same numbers give the same pixels on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError, DataError
from stoker_proto.images.spec import MAX_EDGE

Pixels = NDArray[np.uint8]
Measurements = Mapping[str, NDArray[np.float32]]

HAND_SHAPES: dict[str, tuple[int, ...]] = {"tcp_pose": (7,), "intrinsic_cv": (3, 3), "extrinsic_cv": (3, 4)}
"""What a crop around the hand needs, by its name in the NPZ: position (metres, world frame) and quaternion of the hand; the
camera's matrices in OpenCV's convention (world -> camera, camera -> pixels)."""
_KEY = "data.options.views"
_MAX_VIEWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One window of a camera frame, in pixels."""

    height: int
    width: int
    corner: tuple[int, int] | None
    """(top, left) of a fixed crop; None: the window lies around the hand."""

    def to_json(self) -> dict[str, list[int]]:
        """As `data.options.views` writes it."""
        if self.corner is None:
            return {"hand": [self.height, self.width]}
        return {"crop": [*self.corner, self.height, self.width]}


@dataclass(frozen=True, slots=True)
class Views:
    """The images that a sample has of each camera frame, in this order."""

    views: tuple[View, ...]

    def __len__(self) -> int:
        return len(self.views)

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of the measurements that `cut` needs."""
        return tuple(HAND_SHAPES) if any(view.corner is None for view in self.views) else ()

    def cut(self, frame: Pixels, measurements: Measurements) -> tuple[Pixels, ...]:
        """The images of a frame uint8[H, W, 3]; those inside it share its memory.

        measurements: of this moment; those not in `needed` are ignored. Raises DataError.
        """
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise DataError(f"a frame is {frame.dtype}{list(frame.shape)}: {_KEY} cuts colour frames uint8[H, W, 3]")
        hand = hand_pixel(measurements) if self.needed else (0, 0)
        return tuple(_window(frame, view, hand) for view in self.views)

    def to_json(self) -> list[dict[str, list[int]]]:
        """As `data.options.views` writes it."""
        return [view.to_json() for view in self.views]

    @classmethod
    def parse(cls, value: object) -> Self:
        """From `data.options.views` or from `to_json`. Raises ConfigError."""
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= _MAX_VIEWS:
            raise ConfigError(
                f"{_KEY} is {value!r}: a list of 1 to {_MAX_VIEWS} views is expected, e.g. [{{crop: [0, 48, 224, 160]}}, "
                "{hand: [96, 96]}]"
            )
        return cls(tuple(_parse_view(f"{_KEY}[{number}]", item) for number, item in enumerate(value)))


def hand_pixel(measurements: Measurements) -> tuple[int, int]:
    """(row, column) of the hand in the camera frame; may lie outside of it. Raises DataError."""
    found: dict[str, NDArray[np.float64]] = {}
    for name, shape in HAND_SHAPES.items():
        if name not in measurements:
            known = ", ".join(measurements) or "none"
            raise DataError(f"a view around the hand needs {name} float32{list(shape)}; here are: {known}", field=name)
        found[name] = np.asarray(measurements[name], np.float64)
        if found[name].shape != shape:
            raise DataError(f"shape {list(found[name].shape)}: {list(shape)} is expected", field=name)
    place = _times(found["extrinsic_cv"], [*found["tcp_pose"][:3].tolist(), 1.0])
    u, v, depth = _times(found["intrinsic_cv"], place)
    if not (math.isfinite(u) and math.isfinite(v) and depth > 1e-6):
        raise DataError(
            f"the hand at {found['tcp_pose'][:3].tolist()} is not in front of the camera (depth {depth}): a view around it "
            "cannot be cut; check tcp_pose and extrinsic_cv (world -> camera, in metres)",
            field="tcp_pose",
        )
    limit = float(1 << 20)  # far outside of every frame
    row, column = (min(max(value / depth, -limit), limit) for value in (v, u))
    return math.floor(row + 0.5), math.floor(column + 0.5)


def _times(matrix: NDArray[np.float64], vector: Sequence[float]) -> list[float]:
    """The product, summed from left to right: a BLAS may sum in another order."""
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix.tolist()]


def _window(frame: Pixels, view: View, hand: tuple[int, int]) -> Pixels:
    height, width = frame.shape[:2]
    if view.corner is not None:
        top, left = view.corner
        if top + view.height > height or left + view.width > width:
            raise DataError(
                f"a frame of {height} x {width} pixels: the view {view.to_json()} (top, left, height, width) reaches beyond it; "
                f"correct {_KEY}"
            )
        return frame[top : top + view.height, left : left + view.width]
    top, left = hand[0] - view.height // 2, hand[1] - view.width // 2
    rows, columns = slice(max(0, top), top + view.height), slice(max(0, left), left + view.width)
    if top >= 0 and left >= 0 and top + view.height <= height and left + view.width <= width:
        return frame[rows, columns]
    window = np.zeros((view.height, view.width, 3), np.uint8)
    inside = frame[rows, columns] if rows.stop > 0 and columns.stop > 0 else frame[:0, :0]
    down, right = rows.start - top, columns.start - left
    window[down : down + inside.shape[0], right : right + inside.shape[1]] = inside
    return window


def _parse_view(key: str, item: object) -> View:
    if isinstance(item, Mapping) and len(item) == 1:
        [(kind, numbers)] = item.items()
        count = {"crop": 4, "hand": 2}.get(str(kind))
        if (
            isinstance(numbers, list | tuple)
            and len(numbers) == count
            and all(type(number) is int and 0 <= number <= MAX_EDGE for number in numbers)
            and min(numbers[-2:]) >= 1
        ):
            corner = (numbers[0], numbers[1]) if count == 4 else None
            return View(height=numbers[-2], width=numbers[-1], corner=corner)
    raise ConfigError(
        f"{key} is {item!r}: {{crop: [top, left, height, width]}} or {{hand: [height, width]}} is expected, in pixels, "
        f"up to {MAX_EDGE}"
    )


def views_of_sources(options: Mapping[str, Mapping[str, Any]]) -> Views | None:
    """The one `views` of a run; None where no source has one. options: key of a source in messages -> its `options`.

    Raises ConfigError where sources differ: one policy sees one kind of images.
    """
    found = {key: Views.parse(given["views"]) for key, given in options.items() if given.get("views") is not None}
    kinds = list(dict.fromkeys(found.values()))
    if len(kinds) > 1:
        shown = "; ".join(f"{key}: {views.to_json()}" for key, views in found.items())
        raise ConfigError(
            f"sources have different views ({shown}): a policy sees one kind of images; make them the same"
        )
    return kinds[0] if kinds else None
