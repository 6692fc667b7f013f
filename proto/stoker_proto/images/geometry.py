"""From a frame's size to the model's size: the resizing, padding and cropping steps of image processors, as arithmetic.

    steps ("shortest", 224, 0), ("crop", 224, 224) and a frame of 480 x 640
    ->  ("resize", 0, 0, 224, 298), ("crop", 0, 37, 224, 224)

Each step rounds as transformers' processors do (`image_transforms.py`, `image_processing_pil_idefics3.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stoker_proto.errors import DataError

Step = tuple[Literal["square", "letterbox", "shortest", "longest", "fixed", "crop", "centre"], int, int]
"""`square`: pad to a square; `shortest`, `longest`: scale this edge to a number of pixels; `fixed`, `crop`: height, width.
As in torchvision, `letterbox` pads both sides alike, so the result is one pixel off a square where the difference is odd;
`centre` crops at an offset that is rounded half to even, where `crop` rounds down."""
Operation = tuple[Literal["resize", "pad", "crop"], int, int, int, int]
"""(name, top, left, height, width), in pixels."""

MAX_PIXELS = 1 << 28
"""That an operation may make, on the way to the model's size: a line of 1 x 65535 pixels would be padded to a square of 13 GB."""
_MAX_EDGE = 4096  # the largest that Idefics3 scales to


def operations_for(steps: Sequence[Step], height: int, width: int) -> tuple[Operation, ...]:
    """The operations that turn a frame of this size into the model's; none where it already fits.

    Raises DataError for a frame so long and narrow that one of them would make MAX_PIXELS of it.
    """
    operations, frame = list[Operation](), (height, width)
    for name, first, second in steps:
        if name == "square":
            side = max(height, width)
            _append(operations, ("pad", (side - height) // 2, (side - width) // 2, side, side), height, width)
            height = width = side
        elif name == "letterbox":
            down, right = (max(height, width) - height) // 2, (max(height, width) - width) // 2
            _append(operations, ("pad", down, right, height + 2 * down, width + 2 * right), height, width)
            height, width = height + 2 * down, width + 2 * right
        elif name == "centre":
            top, left = round((height - first) / 2), round((width - second) / 2)
            _append(operations, ("crop", top, left, first, second), height, width)
            height, width = first, second
        elif name == "crop":
            _append(operations, ("crop", (height - first) // 2, (width - second) // 2, first, second), height, width)
            height, width = first, second
        else:
            scaled = _scaled(name, first, second, height, width)
            _append(operations, ("resize", 0, 0, *scaled), height, width)
            height, width = scaled
    for operation, _, _, *size in operations:
        if size[0] * size[1] > MAX_PIXELS:
            raise DataError(
                f"an image of {frame[0]} x {frame[1]} pixels: the model's {operation} makes {size[0]} x {size[1]} of it, and at "
                f"most {MAX_PIXELS} pixels are made; cut it to a more usual shape"
            )
    return tuple(operations)


def visible_share(steps: Sequence[Step], height: int, width: int) -> tuple[float, float]:
    """(of the rows, of the columns) of a frame of this size: the share that is still there after all steps.

    >>> visible_share([("shortest", 224, 0), ("crop", 224, 224)], 480, 640)
    (1.0, 0.7516778523489933)
    """
    shares = []
    for axis, edge in enumerate((height, width)):
        size = float(edge)  # of the whole
        start, stop = 0.0, size  # of what is left of the frame
        content = size  # of the frame, with what was cut, in the present scale
        for name, top, left, new_height, new_width in operations_for(steps, height, width):
            offset, new = (top, left)[axis], (new_height, new_width)[axis]
            if name == "resize":
                scale = new / size
                start, stop, content = start * scale, stop * scale, content * scale
            elif name == "pad":
                start, stop = start + offset, stop + offset
            else:
                start, stop = max(start - offset, 0.0), min(stop - offset, float(new))
            size = float(new)
        shares.append(max(stop - start, 0.0) / content)
    return shares[0], shares[1]


def _append(operations: list[Operation], operation: Operation, height: int, width: int) -> None:
    if operation[3:] != (height, width):
        operations.append(operation)


def _scaled(name: str, first: int, second: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) after a scaling step."""
    if name == "fixed":
        return first, second
    if name == "shortest":
        if width <= height:
            return int(first * height / width), first
        return first, int(first * width / height)
    return _longest_edge(first, height, width)


def _longest_edge(edge: int, height: int, width: int) -> tuple[int, int]:
    """Idefics3: the longest edge becomes `edge`; the other is rounded down, then up to an even number. At most 4096 each."""
    ratio = width / height
    if width >= height:
        height, width = int(edge / ratio), edge
        height += height % 2
    else:
        height, width = edge, int(edge * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > _MAX_EDGE:
        height, width = int(_MAX_EDGE / ratio), _MAX_EDGE
    elif height > width and height > _MAX_EDGE:
        height, width = _MAX_EDGE, int(_MAX_EDGE * ratio)
    return max(height, 1), max(width, 1)
