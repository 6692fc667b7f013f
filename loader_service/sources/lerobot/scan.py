"""The records of one data file: the chosen episodes that begin in it, each checked but for its images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.actions import is_noop
from loader_service.sources.base import NamedFiles, ScannedRecord
from loader_service.sources.lerobot.columns import integers, numeric_columns, parse_rows
from loader_service.sources.lerobot.episode import LeRobotFolder, instructions_of, read_episode, video_files
from loader_service.sources.lerobot.meta import Columns, selected
from loader_service.sources.trajectory import frame_offsets
from stoker_proto.config import DataConfig
from stoker_proto.errors import DataError, located


def scan_shard(shard: Path, folder: LeRobotFolder, config: DataConfig) -> Iterator[ScannedRecord]:
    """The records in the order of their rows. Raises DataError; under policy `skip`, bad episodes say what is wrong."""
    meta, options, reader = folder.meta, folder.options, folder.reader
    skip = config.on_bad_sample == "skip"
    columns = meta.columns
    offsets = _check_info(columns, folder, config)
    rows = meta.rows_of.get(shard.relative_to(meta.info.root).as_posix())
    if rows is None:
        raise DataError("meta/ names no episode that begins in it", file=str(shard))
    chosen = selected(meta, options.episodes)
    lengths = meta.episodes.length[rows]
    try:
        table = reader.read(shard, 0, reader.num_rows(shard), numeric_columns(columns))
        episode_index = integers(table, "episode_index")
    except DataError as error:
        failed = DataError(error.reason, file=str(shard), field=error.field)
        if not skip:
            raise failed from error
        starts = np.cumsum(lengths) - lengths
        for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
            if chosen[row]:
                yield _record(start, int(meta.episodes.length[row]), error=str(failed))
        return
    starts = _first_rows(episode_index, meta.episodes.index[rows])
    is_remote = reader.files.is_remote(shard)
    for place in np.argsort(np.where(starts < 0, len(episode_index), starts), kind="stable").tolist():
        row, start, length = int(rows[place]), int(starts[place]), int(lengths[place])
        if not chosen[row]:
            continue
        episode = int(meta.episodes.index[row])
        try:
            with located(file=str(shard), record=f"episode {episode}"):
                count = int((episode_index == episode).sum()) if start >= 0 else 0
                _check_rows(start, count, length, len(episode_index))
                if start + length <= len(episode_index):
                    parsed = parse_rows(table.slice(start, length), columns, episode, folder.fps_of_timestamps)
                    instructions_of(parsed, folder)
                else:
                    parsed = read_episode(shard, start, length, folder).rows
                files = (
                    None if is_remote else video_files(columns, episode, folder)
                )  # remote ones would be fetched for it
        except DataError as error:
            if not skip:
                raise
            yield _record(max(start, 0), length, error=str(error))
            continue
        actions = parsed.actions[~is_noop(parsed.actions)] if config.action.drop_noops else parsed.actions
        yield _record(start, length, actions=actions, states=parsed.states, offsets=offsets, files=files)


def _check_info(columns: Columns, folder: LeRobotFolder, config: DataConfig) -> NDArray[np.int64] | None:
    """Checks what is the same for all episodes; raises DataError. Returns `ScannedRecord.chunk_offsets`."""
    info, options = folder.meta.info, folder.options
    with located(file=info.file):
        for camera in columns.cameras:
            camera.size()
        if columns.state is not None:
            columns.state.dim()
        dim = columns.action.dim()
    if config.action.drop_noops and dim != 7:
        raise DataError(
            f"{dim} numbers, and data.action.drop_noops is defined for 7 (dxyz, drot, gripper): turn it off",
            file=info.file,
            field=f"features[{columns.action.key}].shape",
        )
    frame_offsets(options.image_history, info.fps, "data.options.image_history")
    deltas = options.action_delta_timestamps
    return None if deltas is None else frame_offsets(deltas, info.fps, "data.options.action_delta_timestamps")


def _first_rows(episode_index: NDArray[np.int64], episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[E]: the row at which each episode begins; -1 where it has none."""
    found, first = np.unique(episode_index, return_index=True)
    at = np.searchsorted(found, episodes)
    at = np.minimum(at, max(len(found) - 1, 0))
    if not len(found):
        return np.full(len(episodes), -1, np.int64)
    starts: NDArray[np.int64] = np.where(found[at] == episodes, first[at], -1)
    return starts


def _check_rows(start: int, count: int, length: int, num_rows: int) -> None:
    if start < 0:
        raise DataError("meta/ says that it begins here, and none of its rows is here", field="episode_index")
    goes_on = start + count == num_rows and count < length  # in the next file
    if count != length and not goes_on:
        raise DataError(f"{count} rows, and meta/ says {length}", field="length")


def _record(
    start: int,
    length: int,
    *,
    actions: NDArray[np.float32] | None = None,
    states: NDArray[np.float32] | None = None,
    offsets: NDArray[np.int64] | None = None,
    error: str | None = None,
    files: NamedFiles | None = None,
) -> ScannedRecord:
    num_samples = length if actions is None else len(actions)
    return ScannedRecord(
        offset=start,
        size=length,
        num_samples=num_samples,
        actions=actions,
        chunk_offsets=offsets,
        states=states,
        error=error,
        files=files,
    )
