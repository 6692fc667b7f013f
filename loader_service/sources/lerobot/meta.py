"""All of `meta/` that is read: info, episodes, tasks; and which episodes begin in which data file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.lerobot.episodes import EpisodeTable, load_episodes, load_tasks
from loader_service.sources.lerobot.info import INFO_PATH, Feature, Info, check_feature, load_info
from loader_service.sources.lerobot.options import LeRobotOptions, Ranges
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.hashing import fingerprint

_STATE_KEY = "observation.state"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the config asks of a data set. Nothing else in it is read, so nothing else can be wrong."""

    options: LeRobotOptions
    state: bool
    """Whether states are read: with `data.state: text`, or where the options name one."""

    @property
    def tasks(self) -> bool:
        """Whether the instructions come from the table of tasks."""
        return self.options.instruction is None


@dataclass(frozen=True, slots=True)
class Columns:
    """Which features of a data set make a sample."""

    cameras: tuple[Feature, ...]
    state: Feature | None
    action: Feature
    has_tasks: bool = True
    """Whether each row's task is read."""


@dataclass(frozen=True, slots=True)
class Meta:
    """A data set's index."""

    info: Info
    columns: Columns
    episodes: EpisodeTable
    tasks: dict[int, str]
    """Empty where the options have the instruction."""
    rows_of: dict[str, NDArray[np.int64]]
    """Data file, relative to the root -> rows of the table whose episodes begin in it, rising."""
    fingerprint: str
    """Of all this: what besides the data files decides what is read."""


def load_meta(root: Path, wanted: Wanted) -> Meta:
    """Raises DataError naming file and field."""
    info = load_info(root)
    columns = choose_columns(info, wanted)
    episodes = load_episodes(info, [camera.key for camera in columns.cameras if camera.dtype == "video"])
    tasks = load_tasks(info) if wanted.tasks else {}
    rows_of = _rows_of(info, episodes)
    _check_videos(info, episodes)
    tables: list[NDArray[Any]] = [episodes.index, episodes.length, episodes.data_chunk, episodes.data_file]
    for places_of_camera in episodes.videos.values():
        tables += [places_of_camera.chunk, places_of_camera.file, places_of_camera.from_timestamp]
    parts = [info.tree, sorted(tasks.items()), [table.tobytes().hex() for table in tables]]
    return Meta(info, columns, episodes, tasks, rows_of, fingerprint(parts))


def _rows_of(info: Info, episodes: EpisodeTable) -> dict[str, NDArray[np.int64]]:
    """`Meta.rows_of`."""
    places = np.stack([episodes.data_chunk, episodes.data_file], axis=1)
    files, inverse = np.unique(places, axis=0, return_inverse=True)
    names = [info.data_file(int(chunk), int(number)) for chunk, number in files.tolist()]
    # By name: a template without all of its fields gives several places the same file.
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    file_of = np.array([number_of[name] for name in names], np.int64)[inverse.reshape(-1)]
    order = np.argsort(file_of, kind="stable")
    bounds = np.searchsorted(file_of[order], np.arange(len(number_of) + 1))
    return {name: order[bounds[i] : bounds[i + 1]] for name, i in number_of.items()}


def _check_videos(info: Info, episodes: EpisodeTable) -> None:
    """Raises DataError where `video_path` gives two cameras, or two files of a camera, the same name."""
    needed = {"video_key", *(("chunk_index", "file_index") if info.is_v3 else ("episode_index",))}
    if info.video_template is not None and needed <= info.video_template.fields:
        return  # nearly always, and there may be 100,000 files
    seen: dict[str, tuple[str, int, int]] = {}
    for key, places in episodes.videos.items():
        for chunk, number in np.unique(np.stack([places.chunk, places.file], axis=1), axis=0).tolist():
            name = info.video_file(key, int(chunk), int(number))
            other = seen.setdefault(name, (key, chunk, number))
            if other != (key, chunk, number):
                raise DataError(
                    f"{info.tree.get('video_path')!r} gives {name} for {_place(info, *other)} and for "
                    f"{_place(info, key, chunk, number)}: write all fields that tell them apart",
                    file=info.file,
                    field="video_path",
                )


def _place(info: Info, key: str, chunk: int, number: int) -> str:
    return f"{key} chunk {chunk} file {number}" if info.is_v3 else f"{key} episode {number}"


def find_root(shard: Path) -> Path:
    """The data set's folder that a data file lies in. Raises DataError."""
    for folder in shard.parents:
        if (folder / INFO_PATH).is_file():
            return folder
    raise DataError(f"no {INFO_PATH} in any folder above it", file=str(shard))


def choose_columns(info: Info, wanted: Wanted) -> Columns:
    """What the options name, or the defaults. Raises DataError for features that are not there or cannot be read."""
    options = wanted.options
    keys = options.image_keys
    if keys is None:
        for feature in info.features.values():
            if feature.looks_like_a_camera:  # a camera that cannot be read must not be left out in silence
                check_feature(feature, info.file)
        keys = tuple(key for key, feature in info.features.items() if feature.is_camera)
    cameras = tuple(_feature(info, key, "image_keys") for key in keys)
    for camera in cameras:
        if not camera.is_camera:
            raise DataError(
                f"dtype {camera.dtype}: no camera, and data.options.image_keys names it",
                file=info.file,
                field=f"features[{camera.key}].dtype",
            )
    state = None
    if wanted.state and (options.state_key is not None or _STATE_KEY in info.features):
        state = _feature(info, options.state_key or _STATE_KEY, "state_key")
    return Columns(cameras, state, _feature(info, options.action_key, "action_key"), has_tasks=wanted.tasks)


def selected(meta: Meta, ranges: Ranges | None) -> NDArray[np.bool_]:
    """bool[E]: which episodes the ranges name. Raises ConfigError where one of them is not there."""
    index = meta.episodes.index
    chosen = np.full(len(index), ranges is None)
    for start, stop in ranges or ():
        first, last = np.searchsorted(index, [start, stop])
        if last - first != stop - start:
            raise ConfigError(
                f"data.options.episodes names {start}{f'-{stop - 1}' if stop - start > 1 else ''}, and {meta.info.root} does "
                f"not have all of these: its {len(index)} episodes are {index[0]} to {index[-1]}"
            )
        chosen[first:last] = True
    return chosen


def _feature(info: Info, key: str, option: str) -> Feature:
    if key not in info.features:
        raise DataError(
            f"no feature {key!r}; there are {', '.join(info.features)}: name the right one in data.options.{option}",
            file=info.file,
            field="features",
        )
    check_feature(info.features[key], info.file)
    return info.features[key]
