"""One episode: its rows, wherever they lie, its texts, and its cameras' frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.lerobot.columns import EpisodeRows, integers, numeric_columns, parse_rows
from loader_service.sources.lerobot.extras import library
from loader_service.sources.lerobot.image_column import ImagePlace, image_frames
from loader_service.sources.lerobot.info import Feature
from loader_service.sources.lerobot.meta import Columns, Meta, choose_columns
from loader_service.sources.lerobot.options import LeRobotOptions
from loader_service.sources.lerobot.rows import RowReader
from loader_service.sources.lerobot.video import video_frames
from loader_service.sources.paths import resolve_inside
from stoker_proto.errors import DataError, located


@dataclass(frozen=True, slots=True)
class Episode:
    """What is known of an episode before its frames are decoded. T frames."""

    rows: EpisodeRows
    instructions: list[str]  # [T]
    columns: Columns
    pieces: tuple[tuple[Path, int, int], ...]
    """Data files and the half-open ranges of its rows in them."""


def read_episode(
    shard: Path, start: int, length: int, meta: Meta, options: LeRobotOptions, reader: RowReader
) -> Episode:
    """The episode whose rows begin at `start`. Raises DataError."""
    columns = choose_columns(meta.info, options)
    pieces = episode_pieces(shard, start, length, meta, reader)
    names = numeric_columns(columns)
    tables = [reader.read(file, first, last, names) for file, first, last in pieces]
    table = tables[0] if len(tables) == 1 else library("pyarrow").concat_tables(tables)
    index = int(integers(table.slice(0, 1), "episode_index")[0])
    expected = int(meta.episodes.length[meta.episodes.row_of(index)])
    with located(record=f"episode {index}"):
        if expected != length:
            raise DataError(f"{length} rows were scanned, and meta/ says {expected}: run loader-prepare again")
        rows = parse_rows(table, columns, index, meta.info.fps)
        return Episode(rows, instructions_of(rows, meta, options), columns, pieces)


def episode_pieces(
    shard: Path, start: int, length: int, meta: Meta, reader: RowReader
) -> tuple[tuple[Path, int, int], ...]:
    """Where the rows lie: in the shard, and where it ends before the episode does, in the data files that follow."""
    pieces = []
    file = shard
    while True:
        stop = min(start + length, reader.num_rows(file))
        pieces.append((file, start, stop))
        length -= stop - start
        if length <= 0:
            return tuple(pieces)
        file, start = _next_file(file, meta, reader), 0


def _next_file(file: Path, meta: Meta, reader: RowReader) -> Path:
    """The data file after this one: the next number of its chunk, or the first of the next chunk."""
    root = meta.info.root
    name = file.relative_to(root).as_posix()
    rows = meta.rows_of.get(name) if meta.info.is_v3 else None
    if rows is not None and len(rows):
        chunk, number = int(meta.episodes.data_chunk[rows[0]]), int(meta.episodes.data_file[rows[0]])
        for follower in (meta.info.data_file(chunk, number + 1), meta.info.data_file(chunk + 1, 0)):
            if reader.files.is_there(root / follower):
                return root / follower
    raise DataError("it ends before the episode does, which is longer in meta/", file=str(file))


def instructions_of(rows: EpisodeRows, meta: Meta, options: LeRobotOptions) -> list[str]:
    """The text of each frame. Raises DataError for a task without one."""
    if options.instruction is not None:
        return [options.instruction] * len(rows.task_index)
    texts = []
    for t, task in enumerate(rows.task_index.tolist()):
        text = meta.tasks.get(task)
        if text is None or not text.strip():
            raise DataError(
                f"task {task} has no text in meta/tasks: add it, or set data.options.instruction",
                field=f"task_index[{t}]",
            )
        texts.append(text)
    return texts


def video_place(camera: Feature, episode: int, meta: Meta, data_root: str) -> tuple[str, float]:
    """Path of the mp4 with the camera's frames, and the time in it, in seconds, at which the episode begins."""
    row, place = meta.episodes.row_of(episode), meta.episodes.videos[camera.key]
    name = meta.info.video_file(camera.key, int(place.chunk[row]), int(place.file[row]))
    root = str(meta.info.root)
    return resolve_inside(name, base=root, root=data_root, field="video_path"), float(place.from_timestamp[row])


def frame_numbers(timestamps: NDArray[np.float64], start_s: float, fps: float) -> NDArray[np.int64]:
    """int64[T]: each frame's number in its video file.

    >>> frame_numbers(np.array([0.0, 0.1, 0.2]), 1.5, 10.0).tolist()
    [15, 16, 17]
    """
    return np.rint((start_s + timestamps) * fps).astype(np.int64)


def open_camera(
    camera: Feature, episode: Episode, wanted: list[int], meta: Meta, data_root: str, reader: RowReader
) -> Iterator[NDArray[np.uint8]]:
    """Frames uint8[H, W, 3] of the timesteps `wanted` (rising), decoded one after another as they are taken."""
    with located(file=meta.info.file):
        size = camera.size()
    if camera.dtype == "video":
        path, start_s = video_place(camera, episode.rows.episode, meta, data_root)
        numbers: list[int] = frame_numbers(episode.rows.timestamps[wanted], start_s, meta.info.fps).tolist()
        path = str(reader.files.local(Path(path)))
        return video_frames(path, numbers, fps=meta.info.fps, size=size)
    cells: Iterator[Any] = (
        row[camera.key]
        for file, start, stop in episode.pieces
        for row in reader.images(file, start, stop, [camera.key])
    )
    place = ImagePlace(str(meta.info.root), data_root, reader.files)
    return image_frames(cells, wanted, size, key=camera.key, place=place)
