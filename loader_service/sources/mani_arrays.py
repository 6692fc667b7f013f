"""What a trajectory's NPZ holds for `mani_openpi`: the cameras' frames and, where the row has none, the states.

    rgb uint8[T, H, W, 3], wrist_rgb uint8[T, H', W', 3], depth uint16[T, H, W] or [T, H, W, 1] in mm, state float[T, S]

T is the number of actions, or one more. Letters: T timesteps, S numbers of a state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.mani_options import ManiOpenPIOptions, Names
from loader_service.sources.npz import Frames, NpzFile
from stoker_proto.errors import DataError
from stoker_proto.images.views import HAND_SHAPES


def open_frames(
    npz: NpzFile, options: ManiOpenPIOptions, num_actions: int, *, depth: bool, verify: bool
) -> list[Frames]:
    """The cameras' frames [T, H, W, 3]; where asked for, depth frames [T, H, W] stand behind those of the first.

    verify: compare the CRC of stored members too; else `npz.check_rest` must check that of deflated ones, when all frames were
    read. Raises DataError.
    """
    streams: dict[str, Frames] = {}
    for key, names in options.cameras().items():
        name = _first_present(npz, names, key)
        frames = npz.frames(name, dtype=np.uint8, ndim=4, check_later=not verify)
        if frames.shape[3] != 3 or 0 in frames.shape:
            raise DataError(f"shape {list(frames.shape)}: [T, H, W, 3] is expected", file=npz.path, field=name)
        first = not streams
        streams[name] = frames
        if first and depth:
            name = _first_present(npz, options.depth_keys, "data.options.depth_keys")
            streams[name] = _depth(npz, name, frames)
    for name, frames in streams.items():
        _check_length(npz, name, len(frames), num_actions, "images")
        if verify:
            npz.verify(name)
    return list(streams.values())


def read_states(npz: NpzFile, names: Names, num_actions: int, *, verify: bool = False) -> NDArray[np.float32]:
    """float32[T, S], read whole: it is small. Raises DataError."""
    name = next((name for name in names if name in npz.names), None)
    if name is None:
        raise DataError(
            f"no states: the row has no `states`, and there is none of the arrays {', '.join(names)}, only "
            f"{', '.join(npz.names) or 'nothing'}: name the right one in data.options.state_keys, or set data.state to none",
            file=npz.path,
            field="states",
        )
    return _read_numbers(npz, name, num_actions, "states", verify=verify)


def read_auxiliary(npz: NpzFile, names: Names, num_actions: int, *, verify: bool = False) -> NDArray[np.float32]:
    """float32[T, A]: what training predicts beside the actions. Raises DataError."""
    name = _first_present(npz, names, "data.options.auxiliary_keys")
    return _read_numbers(npz, name, num_actions, "auxiliary values", verify=verify)


def read_measurements(
    npz: NpzFile, names: Names, num_actions: int, *, verify: bool = False
) -> dict[str, NDArray[np.float32]]:
    """Name -> float32[T, ...], in the shapes that views need (`stoker_proto.images.views`). Raises DataError."""
    found = {}
    for name in names:
        shape = HAND_SHAPES[name]
        if name not in npz.names:
            raise DataError(
                f"there is no such array, which data.options.views needs: float32[T, {', '.join(map(str, shape))}]; there are "
                f"{', '.join(npz.names) or 'none'}",
                file=npz.path,
                field=name,
            )
        array = npz.frames(name, dtype=np.float32, ndim=1 + len(shape))
        if array.shape[1:] != shape:
            raise DataError(f"shape {list(array.shape)}: [T, *{list(shape)}] is expected", file=npz.path, field=name)
        _check_length(npz, name, len(array), num_actions, "measurements")
        if verify:
            npz.verify(name)
        found[name] = array.whole()
    return found


def _read_numbers(npz: NpzFile, name: str, num_actions: int, what: str, *, verify: bool) -> NDArray[np.float32]:
    array = npz.frames(name, dtype=None, ndim=2)
    if array.dtype.kind not in "fiu" or not array.shape[1]:
        raise DataError(
            f"{array.dtype} {list(array.shape)}: numbers [T, S] are expected, one row for each action, or one more",
            file=npz.path,
            field=name,
        )
    _check_length(npz, name, len(array), num_actions, what)
    if verify:
        npz.verify(name)
    values = array.whole()
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found below
        states = values.astype(np.float32)
    wrong = np.argwhere(~np.isfinite(states))
    if len(wrong):
        t, s = wrong[0].tolist()
        raise DataError(
            f"{values[t, s]} is not a finite 32-bit number: correct the file or remove the line",
            file=npz.path,
            field=f"{name}[{t}][{s}]",
        )
    return states


def _depth(npz: NpzFile, name: str, rgb: Frames) -> Frames:
    depth = npz.frames(name, dtype=np.uint16, ndim=3, drop_channel=True)
    if depth.shape[1:] != rgb.shape[1:3]:
        raise DataError(
            f"shape {list(depth.shape)}: [T, H, W] with the size of the colour frames, {list(rgb.shape[1:3])}, is expected",
            file=npz.path,
            field=name,
        )
    return depth


def _check_length(npz: NpzFile, name: str, count: int, num_actions: int, what: str) -> None:
    if count not in (num_actions, num_actions + 1):
        raise DataError(
            f"{count} {what} and {num_actions} actions: as many {what}, or one more, are expected",
            file=npz.path,
            field=name,
        )


def _first_present(npz: NpzFile, names: Names, key: str) -> str:
    for name in names:
        if name in npz.names:
            return name
    raise DataError(
        f"none of the arrays {', '.join(names)} is there; there are {', '.join(npz.names) or 'none'}: name the right one "
        f"in {key}",
        file=npz.path,
    )
