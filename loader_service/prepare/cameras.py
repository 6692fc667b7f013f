"""Which parts of the cameras' frames a model never sees: its processor may cut the sides off.

frames of 640x480, shortest edge 224, centre crop 224 x 224      a quarter of the columns is cut
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from stoker_proto.images.geometry import visible_share
from stoker_proto.images.spec import ImageSpec

_NOTABLE = 0.02
"""Share of a frame's rows or columns whose loss is worth a warning. Rounding costs less."""


def camera_findings(frames: Sequence[NDArray[Any]], spec: ImageSpec | None) -> list[str]:
    """A line for each size of frames [H, W, ...] of which the model's steps cut a part off."""
    if spec is None:
        return []
    lines = []
    for height, width in dict.fromkeys(frame.shape[:2] for frame in frames):
        rows, columns = visible_share(spec.steps, height, width)
        for share, sides in ((rows, "top and bottom"), (columns, "left and right")):
            if 1 - share > _NOTABLE:
                lines.append(
                    f"the model's processor cuts {1 - share:.0%} off frames of {width}x{height}, at {sides}, and what happens "
                    "there is not seen: set data.image.pad_to_square to true, or record with another aspect ratio"
                )
    return lines
