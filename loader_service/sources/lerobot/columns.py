"""Columns of a parquet table -> arrays, checked.

    action: fixed_size_list<float>[7] | list<float>      timestamp: float      task_index: int64

Letters: T frames of one episode, D numbers of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.extras import library
from loader_service.sources.lerobot.episodes import whole_numbers
from loader_service.sources.lerobot.info import Feature
from loader_service.sources.lerobot.meta import Columns
from stoker_proto.errors import DataError


@dataclass(frozen=True, slots=True)
class EpisodeRows:
    """What the data file says of one episode."""

    episode: int
    actions: NDArray[np.float32]  # [T, D]
    states: NDArray[np.float32] | None  # [T, S]
    timestamps: NDArray[np.float64]  # [T], seconds from the episode's first frame on
    task_index: NDArray[np.int64] | None  # [T]; None where the options have the instruction


def numeric_columns(columns: Columns) -> list[str]:
    """What is read of a data file, but for images."""
    tasks = ["task_index"] if columns.has_tasks else []
    state = [] if columns.state is None else [columns.state.key]
    return list(dict.fromkeys(["episode_index", "frame_index", "timestamp", *tasks, columns.action.key, *state]))


_TOLERANCE = 0.25
"""Largest error of a timestamp, as a share of a frame's duration. Half a frame would mean another frame. A quarter is enough for
seconds written as float32 (half an ulp is 1 ms after 4 hours) and for clock jitter. lerobot's own 1e-4 s is not."""


def parse_rows(table: Any, columns: Columns, episode: int, fps: float | None) -> EpisodeRows:
    """The rows of one episode. Raises DataError naming the field and, where there is one, the frame and the dimension.

    Timestamps say which frames of a video belong to the rows, `fps` (of info.json) what a row is of actions and history: both
    must mean the same. fps: None: frames are told by frame_index alone, and timestamps are not checked.
    """
    found = integers(table, "episode_index")
    if len(np.flatnonzero(found != episode)):
        other = int(found[found != episode][0])
        raise DataError(
            f"a row of episode {other} among its rows: meta/ and data/ do not belong together", field="episode_index"
        )
    frame_index = integers(table, "frame_index")
    wrong = np.flatnonzero(frame_index != np.arange(len(frame_index)))
    if len(wrong):
        t = int(wrong[0])
        raise DataError(f"{int(frame_index[t])}: 0, 1, 2 ... are expected", field=f"frame_index[{t}]")
    timestamps = _numbers(table.column("timestamp"), "timestamp").astype(np.float64)
    if fps is not None:
        _check_timestamps(timestamps, fps)
    return EpisodeRows(
        episode,
        vectors(table, columns.action),
        None if columns.state is None else vectors(table, columns.state),
        timestamps,
        integers(table, "task_index") if columns.has_tasks else None,
    )


def _check_timestamps(timestamps: NDArray[np.float64], fps: float) -> None:
    _check_finite(timestamps[:, None], "timestamp")
    wrong = np.flatnonzero(np.abs(timestamps * fps - np.arange(len(timestamps))) > _TOLERANCE)
    if len(wrong):
        t = int(wrong[0])
        raise DataError(
            f"{timestamps[t]:.7g} s, and frame {t} at fps {fps:g} (meta/info.json) is at {t / fps:.7g} s: correct fps, mend or "
            "leave out the episode (data.options.episodes), or set data.options.match_frames: frame_index if its clock drifts",
            field=f"timestamp[{t}]",
        )


def integers(table: Any, name: str) -> NDArray[np.int64]:
    """int64[T]; floating-point numbers that are all whole are taken as such."""
    values = whole_numbers(_numbers(table.column(name), name))
    if values.dtype.kind not in "iu":
        raise DataError(f"{values.dtype}: whole numbers are expected", field=name)
    return values.astype(np.int64)


def vectors(table: Any, feature: Feature) -> NDArray[np.float32]:
    """float32[T, D], finite."""
    arrow = library("pyarrow")
    name, dim = feature.key, feature.dim()
    column = table.column(name).combine_chunks()
    kind = column.type
    if arrow.types.is_fixed_size_list(kind) or arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
        if column.null_count:
            raise DataError("null: a vector is expected in every row", field=name)
        if arrow.types.is_fixed_size_list(kind):
            lengths = np.full(len(column), kind.list_size)
        else:
            lengths = np.diff(column.offsets.to_numpy())
        wrong = np.flatnonzero(lengths != dim)
        if len(wrong):
            t = int(wrong[0])
            raise DataError(f"{lengths[t]} numbers, and info.json says {dim}", field=f"{name}[{t}]")
        values = _numbers(column.flatten(), name)
    elif dim == 1:
        values = _numbers(column, name)
    else:
        raise DataError(f"{kind}: a list of {dim} numbers is expected", field=name)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found below
        result = values.astype(np.float32).reshape(-1, dim)
    _check_finite(result, name)
    return result


def _check_finite(values: NDArray[Any], name: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        t, d = (int(i) for i in np.argwhere(~finite)[0])
        place = f"{name}[{t}][{d}]" if values.shape[1] > 1 else f"{name}[{t}]"
        raise DataError(
            f"{values[t, d]} is not a finite 32-bit number: mend or leave out the episode (data.options.episodes)",
            field=place,
        )


def _numbers(column: Any, name: str) -> NDArray[Any]:
    """The column as numbers, without nulls."""
    arrow = library("pyarrow")
    kind = column.type
    is_number = arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_boolean(kind)
    if not is_number or column.null_count:
        reason = "null" if is_number else str(kind)
        raise DataError(f"{reason}: a number is expected in every row", field=name)
    values: NDArray[Any] = (
        column.to_numpy() if column.__class__ is arrow.ChunkedArray else column.to_numpy(zero_copy_only=False)
    )
    return values
