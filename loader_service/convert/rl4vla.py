"""Episodes of RL4VLA's and SimplerEnv's collectors: one pickled dict per file.

    {"is_image_encode": False, "image": [<PIL image>, ...], "instruction": "put the carrot on the plate",
     "action": [float32[7], ...], "info": [...]}

With `is_image_encode` the images are JPEG bytes. Their collector gives RGB arrays to OpenCV, which takes them for BGR, so red and
blue are swapped in the files. Their reader, also with OpenCV, swaps them back. So does this one.
Source: gen-robot/RL4VLA, its data collector and RLDS builder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loader_service.convert.episode import Episode, EpisodeRef, check_episode_size
from loader_service.convert.images import decode_frames
from loader_service.shards import expand_entry
from stoker_proto.errors import DataError, located


@dataclass(frozen=True, slots=True, kw_only=True)
class RL4VLA:
    """Files that hold one episode each."""

    inputs: tuple[str, ...]
    task: str | None = None
    """Task id of all of them, for the rows; they carry their instruction themselves."""
    encoded_rgb: bool = False
    """Encoded images have their colours in the right order."""

    def episodes(self) -> list[EpisodeRef]:
        """One per file."""
        files = [file for entry in self.inputs for file in expand_entry(entry, ("**/*.npz", "**/*.npy"))]
        return [EpisodeRef(file=str(file), name=file.stem, size_bytes=file.stat().st_size) for file in files]

    def read(self, ref: EpisodeRef) -> Episode:
        """Unpickles the file."""
        from loader_service.convert.pickled import load_pickled_dict

        tree = load_pickled_dict(Path(ref.file))
        with located(file=ref.file, record=ref.name):
            for key in ("image", "action", "instruction"):
                if key not in tree:
                    raise DataError(f"no such key; there are {', '.join(map(str, tree))}", field=key)
            return Episode(
                rgb=self._frames(tree["image"]),
                actions=_actions(tree["action"]),
                task=self.task,
                instruction=_text(tree["instruction"]),
                success=_success(tree.get("info")),
            )

    def identity(self) -> dict[str, Any]:
        """Task and colour order."""
        return {"format": "rl4vla, with success", "task": self.task, "encoded_rgb": self.encoded_rgb}

    def _frames(self, images: Any) -> NDArray[np.uint8]:
        if not isinstance(images, list | tuple | np.ndarray) or len(images) == 0:
            raise DataError(f"{type(images).__name__}: a list of images is expected", field="image")
        first = images[0]
        if isinstance(first, bytes | bytearray) or (isinstance(first, np.ndarray) and first.ndim == 1):
            if not all(isinstance(image, bytes | bytearray | np.ndarray) for image in images):
                raise DataError("encoded images and others", field="image")
            frames = decode_frames([bytes(image) for image in images], "image")
            return frames if self.encoded_rgb else np.ascontiguousarray(frames[..., ::-1])
        return _stack(list(images))


def _stack(images: Sequence[Any]) -> NDArray[np.uint8]:
    """uint8[F, H, W, 3] of arrays or of pickled PIL images."""
    from loader_service.convert.pickled import PickledImage

    frames: NDArray[np.uint8] | None = None
    for number, image in enumerate(images):
        field = f"image[{number}]"
        frame = _pixels(image, field) if isinstance(image, PickledImage) else image
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            found = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(image).__name__
            raise DataError(f"{found}: uint8 [H, W, 3], a PIL image or encoded bytes are expected", field=field)
        if frames is None:
            check_episode_size(len(images), frame.nbytes)
            frames = np.empty((len(images), *frame.shape), np.uint8)
        if frame.shape != frames.shape[1:]:
            raise DataError(
                f"shape {list(frame.shape)} after {list(frames.shape[1:])}: one size is needed", field=field
            )
        frames[number] = frame
    if frames is None:
        raise DataError("no image", field="image")
    return frames


def _pixels(image: Any, field: str) -> NDArray[np.uint8]:
    if image.mode not in ("RGB", "RGBA", "L"):
        raise DataError(f"a PIL image of mode {image.mode}: RGB, RGBA and L are read", field=field)
    try:
        return np.array(Image.frombytes(image.mode, image.size, image.data).convert("RGB"))
    except (ValueError, OSError, AttributeError) as error:
        raise DataError(f"a damaged PIL image ({error})", field=field) from error


def _actions(value: Any) -> NDArray[np.float32]:
    try:
        actions = np.stack([np.asarray(action, np.float32).reshape(-1) for action in value])
    except (ValueError, TypeError) as error:
        raise DataError(f"actions that are not lists of numbers of one length ({error})", field="action") from error
    return actions


def _success(infos: Any) -> bool | None:
    """Whether a step of the episode succeeded; None where the steps do not say it."""
    if not isinstance(infos, list | tuple):
        return None
    said = [info.get("success") for info in infos if isinstance(info, Mapping)]
    said = [value.reshape(-1)[0] if isinstance(value, np.ndarray) and value.size == 1 else value for value in said]
    known = [bool(value) for value in said if isinstance(value, bool | int | float | np.bool_ | np.number)]
    return any(known) if known else None


def _text(value: Any) -> str:
    """The instruction; vectorised environments give a list of equal ones."""
    if isinstance(value, list | tuple | np.ndarray) and len(value) and all(str(one) == str(value[0]) for one in value):
        value = value[0]
    if not isinstance(value, str):
        raise DataError(f"{value!r:.60}: a text is expected", field="instruction")
    return str(value)
