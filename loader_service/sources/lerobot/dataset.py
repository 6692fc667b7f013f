"""`lerobot`: LeRobot data sets, v2.1 and v3.0. An entry of the data paths is a data set's folder.

    bridge/meta/info.json, tasks, episodes            the index: read whole, part of what identifies a scan
    bridge/data/chunk-000/file-000.parquet            a shard; a record is an episode, its offset the first of its rows
    bridge/videos/<camera>/chunk-000/file-000.mp4     opened when an episode is read

Sample t is frame t: the cameras' images, the state, the task's text, and actions t, t+1, ..., t+K-1 (K = data.action.chunk);
after the end the last action is repeated, and `action_is_pad` says where.

Letters: T frames of an episode, K actions in a chunk, N samples.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from loader_service.remote.url import is_url
from loader_service.shards import EntryShards
from loader_service.sources.base import BaseSFTDataset, RecordContent, Sample, ScannedRecord
from loader_service.sources.extras import library
from loader_service.sources.lerobot.columns import integers
from loader_service.sources.lerobot.compatibility import check_alike
from loader_service.sources.lerobot.episode import Episode, LeRobotFolder, open_camera, read_episode, video_files
from loader_service.sources.lerobot.files import Files
from loader_service.sources.lerobot.info import INFO_PATH
from loader_service.sources.lerobot.locate import locate, named_sets
from loader_service.sources.lerobot.meta import Meta, Wanted, find_root, load_meta
from loader_service.sources.lerobot.options import overlap, read_lerobot_options
from loader_service.sources.lerobot.rows import RowReader
from loader_service.sources.lerobot.scan import scan_shard
from loader_service.sources.trajectory import Trajectory, frame_offsets
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, located
from stoker_proto.hashing import fingerprint


class LeRobotDataset(BaseSFTDataset):
    """Episodes of LeRobot data sets."""

    shard_patterns = ("data/*/*.parquet",)
    version = 5  # states are read only where they are asked for

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        _check_installed()
        self.options = read_lerobot_options(config.options)
        self.action_key = self.options.action_key
        deltas = self.options.action_delta_timestamps
        if deltas is not None and len(deltas) != config.action.chunk:
            raise ConfigError(
                f"data.options.action_delta_timestamps has {len(deltas)} moments, and data.action.chunk is "
                f"{config.action.chunk}: as many are needed"
            )
        if deltas is not None and config.action.drop_noops:
            raise ConfigError(
                "data.action.drop_noops leaves out moments that data.options.action_delta_timestamps names: set one of them"
            )
        if config.image.depth:
            raise ConfigError("data.image.depth is on, and LeRobot's depth cameras are not read: turn it off")
        self.wanted = Wanted(self.options, config.state == "text" or self.options.state_key is not None)
        """What of a data set is read."""
        self._rows = RowReader(Files(self.remote))
        self._metas: dict[Path, Meta] = {}
        self._roots: dict[Path, Path] = {}  # of shards' folders
        self._located: dict[Path, Meta] = {}  # by this one and its splits, in order
        self._lock = threading.Lock()

    def scan_identity(self) -> dict[str, Any]:
        """Adds whether states are read."""
        identity = super().scan_identity()
        return {**identity, "state": "text"} if self.config.state == "text" else identity

    def for_split(self, split: str) -> LeRobotDataset:
        """With the episodes of the split."""
        options, data = self.options, self.config
        if options.episodes is not None or options.val_episodes is not None:
            train, val = (
                set().union(*map(named_sets, paths)) for paths in (data.train_data_paths, data.val_data_paths)
            )
            both = train & val
            if both and overlap(options.episodes, options.val_episodes):
                raise ConfigError(
                    f"{min(both)} is trained and validated on, and data.options.episodes and data.options.val_episodes have "
                    "episodes in common: set both, without overlap"
                )
        changed = {key: value for key, value in data.options.items() if key not in ("episodes", "val_episodes")}
        chosen = data.options.get("episodes" if split == "train" else "val_episodes")
        if chosen is not None:
            changed["episodes"] = chosen
        view = LeRobotDataset(dataclasses.replace(data, options=changed))
        view._located = self._located  # what is validated on must be like what is trained on
        return view

    def locate(self, path: str) -> EntryShards:
        """The data files that hold the chosen episodes, with the fingerprint of `meta/`.

        Raises DataError too where a data set and those located before differ in what a sample is made of.
        """
        return self._locate(path, may_lack=False)

    def locate_here(self, path: str) -> EntryShards:
        """The same, of data files that are on this host."""
        return self._locate(path, may_lack=True)

    def _locate(self, path: str, *, may_lack: bool) -> EntryShards:
        if self.remote is not None and is_url(path):
            from loader_service.sources.lerobot.remote import locate_remote

            shards, metas = locate_remote(path, self.wanted, self.remote)
        else:
            shards, metas = locate(path, self.wanted, may_lack=may_lack)
        with self._lock:
            self._metas.update(metas)
            self._located.update(metas)
            located_sets = list(self._located.values())
        check_alike(located_sets, self.wanted, self.config)
        return shards

    def action_names(self, shards: Sequence[Path]) -> set[tuple[str, ...]]:
        """`names` of the feature that is the action, in each data set's info.json."""
        features = [self._meta(shard).info.features.get(self.action_key) for shard in shards]
        return {feature.names for feature in features if feature is not None and feature.names}

    def beside(self, shards: Sequence[Path]) -> str:
        """Of `meta/` of each data set. Copies of remote ones never change."""
        if any(self._rows.files.is_remote(shard) for shard in shards):
            return ""
        return fingerprint(sorted({self._meta(shard).fingerprint for shard in shards}))

    def findings(self, shards: Sequence[Path]) -> Iterator[str]:
        """Data sets whose table of episodes is shorter than their info.json says: a part of `meta/` may be missing."""
        metas = {} if self.options.episodes is not None else {id(meta): meta for meta in map(self._meta, shards)}
        for meta in metas.values():
            said, found = meta.info.tree.get("total_episodes"), len(meta.episodes.index)
            if type(said) is int and said > found:
                yield (
                    f"{meta.info.file} says total_episodes {said}, and meta/ has {found} episodes, which are all that is read: "
                    "fetch meta/ again, or correct the number"
                )

    def preload(self, shards: Sequence[Path]) -> None:
        """pyarrow and PyAV, and Pillow's formats for frames in parquet files."""
        for name in ("pyarrow.parquet", "av", "av.video.reformatter"):
            library(name)
        Image.preinit()

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        """The chosen episodes that begin in the data file. No image is opened; whether the videos are there is looked up."""
        return scan_shard(shard, self._folder(shard), self.config)

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        """The episode's samples, one after another, its videos decoded in step."""
        folder = self._folder(shard)
        file, record = self.where(shard, offset)
        with located(file=file, record=record):
            episode = read_episode(shard, offset, size, folder)
        with located(file=str(shard), record=f"episode {episode.rows.episode}"):
            yield from self._samples(episode, folder)

    def content(self, shard: Path, offset: int, size: int) -> RecordContent | None:
        """The entry's content and the headers of the episode's videos.

        None behind a URL, with images that may lie in files, and for an episode that ends in another data file."""
        if self._rows.files.is_remote(shard):
            return None
        folder = self._folder(shard)
        columns = folder.meta.columns
        if any(camera.dtype != "video" for camera in columns.cameras) or offset + size > self._rows.num_rows(shard):
            return None
        episode = integers(self._rows.read(shard, offset, offset + 1, ["episode_index"]), "episode_index")
        return RecordContent(None, video_files(columns, int(episode[0]), folder))

    def where(self, shard: Path, offset: int) -> tuple[str, str]:
        """With the first row of the episode."""
        return str(shard), f"at row {offset}"

    def _samples(self, episode: Episode, folder: LeRobotFolder) -> Iterator[Sample]:
        options, fps = self.options, folder.meta.info.fps
        is_remote = folder.reader.files.is_remote(folder.meta.info.root / INFO_PATH)
        deltas = options.action_delta_timestamps
        trajectory = Trajectory(
            actions=episode.rows.actions,
            states=episode.rows.states,
            instructions=episode.instructions,
            drop_noops=self.config.action.drop_noops,
            chunk_offsets=np.arange(self.config.action.chunk)
            if deltas is None
            else frame_offsets(deltas, fps, "data.options.action_delta_timestamps"),
            history_offsets=frame_offsets(options.image_history, fps, "data.options.image_history"),
            files=None if is_remote else video_files(episode.columns, episode.rows.episode, folder),
        )
        yield from trajectory.samples(
            lambda wanted: [open_camera(camera, episode, wanted, folder) for camera in episode.columns.cameras]
        )

    def _folder(self, shard: Path) -> LeRobotFolder:
        meta = self._meta(shard)
        return LeRobotFolder(meta, self.options, self._rows, self.root_of(shard) or str(meta.info.root))

    def _meta(self, shard: Path) -> Meta:
        """The index of the data set that the shard belongs to, read once."""
        store = self.remote if self._rows.files.is_remote(shard) else None
        with self._lock:
            root = self._roots.get(shard.parent)
            if root is None:
                root = find_root(shard) if store is None else store.folder_above(shard, INFO_PATH)
                self._roots[shard.parent] = root
            if root in self._metas:
                return self._metas[root]
            if store is None:
                return self._metas.setdefault(root, load_meta(root, self.wanted))
        from loader_service.sources.lerobot.remote import remote_meta

        meta = remote_meta(root, store, self.wanted)  # without the lock: nobody else's files wait for it
        with self._lock:
            return self._metas.setdefault(root, meta)


def _check_installed() -> None:
    """Raises ConfigError if a library is missing; imports none, so that a loader's start stays short."""
    for name in ("pyarrow", "av"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"data.dataset_type lerobot needs the library {name}: run `pip install 'stoker[lerobot]'`"
            )
