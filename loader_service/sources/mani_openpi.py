"""`mani_openpi`: ManiSkill demonstrations as JSONL + NPZ, one trajectory per line.

    {"obs_path": "traj_000123/obs.npz", "task": "PutOnPlateInScene25Main-v3", "actions": [[0.12, -0.07, ...], ...]}

`obs_path` is relative to the JSONL file. The NPZ holds `rgb` uint8[T, H, W, 3] and, where data.image.depth asks for it, `depth`
uint16[T, H, W] or [T, H, W, 1] in mm. An `instruction` in the row goes before the task table. T images belong to T actions,
image t is what was seen just before action t; T + 1 images are legal, the last one has no action. Sample t is timestep t: its
images, the instruction, and actions t, t+1, ..., t+K-1 (K = data.action.chunk; after the end the last action is repeated).

Letters: T timesteps, D dimensions of an action, K actions in a chunk, N samples.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from loader_service.sources.actions import action_chunks, is_noop, parse_actions
from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord
from loader_service.sources.jsonl import cut_lines, iter_lines, line_number, parse_object, read_line
from loader_service.sources.npz import Frames, NpzFile
from loader_service.sources.paths import resolve_inside
from loader_service.sources.tasks import instruction_of, load_task_table
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.hashing import fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class ManiOpenPIOptions:
    """`data.options` of this dataset."""

    rgb_keys: tuple[str, ...] = ("rgb", "image", "images")
    """Names that the colour frames may have in the NPZ; the first that is there is taken."""
    depth_keys: tuple[str, ...] = ("depth",)
    """Names that the depth frames may have."""
    action_dim: int = 7
    """Numbers in an action."""


class ManiOpenPIDataset(BaseSFTDataset):
    """Trajectories of a JSONL file with one NPZ each."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.options = _read_options(config.options)
        if config.action.drop_noops and self.options.action_dim != 7:
            raise ConfigError(
                f"data.action.drop_noops is on and data.options.action_dim is {self.options.action_dim}: what moves "
                "nothing is defined for 7 dimensions (dxyz, drot, gripper); turn it off"
            )
        self.tasks = load_task_table(config.task_table)

    def scan_identity(self) -> dict[str, Any]:
        """Under policy `skip` a task without an instruction is a bad record, so the task table counts."""
        identity = super().scan_identity()
        return identity if self.config.on_bad_sample == "fail" else {**identity, "tasks": fingerprint(self.tasks)}

    def read_identity(self) -> dict[str, Any]:
        """Adds the task table, which decides the instructions."""
        return {**super().read_identity(), "tasks": fingerprint(self.tasks)}

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        """One pass over the lines; no NPZ is opened."""
        return self.scan_part(shard, 0, shard.stat().st_size)

    def cut(self, shard: Path, part_bytes: int) -> list[int]:
        """At the ends of lines."""
        return cut_lines(shard, part_bytes)

    def scan_part(self, shard: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        """The trajectories whose lines begin in bytes [start, stop)."""
        for offset, line in iter_lines(shard, start, stop):
            try:
                yield self._scan_line(offset, line)
            except DataError as error:
                located = DataError(error.reason, file=f"{shard}:{line_number(shard, offset)}", field=error.field)
                if self.config.on_bad_sample == "fail":
                    raise located from error
                yield ScannedRecord(offset=offset, size=len(line), num_samples=_num_actions(line), error=str(located))

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        """The trajectory's samples, one at a time; a bad trajectory fails before its first sample, where that can be known."""
        try:
            yield from self._read_record(shard, offset, size, verify=False)
        except DataError as error:
            raise self._located(error, shard, offset) from error

    def verify(self, shard: Path, offset: int, size: int) -> int:
        """Reads every frame, and compares the CRC of stored members too."""
        try:
            return sum(1 for _ in self._read_record(shard, offset, size, verify=True))
        except DataError as error:
            raise self._located(error, shard, offset) from error

    def _located(self, error: DataError, shard: Path, offset: int) -> DataError:
        """The same error with the JSONL line that it belongs to."""
        line = f"{shard}:{line_number(shard, offset)}"
        if error.file and error.file != str(shard):
            return DataError(error.reason, file=error.file, record=line, field=error.field)
        return DataError(error.reason, file=line, field=error.field)

    def _scan_line(self, offset: int, line: bytes) -> ScannedRecord:
        row = parse_object(line)
        if not isinstance(row.get("obs_path"), str):
            raise DataError(f"{row.get('obs_path')!r}: the path of an NPZ is expected", field="obs_path")
        actions = parse_actions(row.get("actions"), self.options.action_dim)
        instruction_of(row, self.tasks)
        if self.config.action.drop_noops:
            actions = actions[~is_noop(actions)]
        return ScannedRecord(offset=offset, size=len(line), num_samples=len(actions), actions=actions)

    def _read_record(self, shard: Path, offset: int, size: int, *, verify: bool) -> Iterator[Sample]:
        row = parse_object(read_line(shard, offset, size))
        actions = parse_actions(row.get("actions"), self.options.action_dim)  # [T, D]
        instruction = instruction_of(row, self.tasks)
        action = self.config.action
        kept = np.flatnonzero(~is_noop(actions)) if action.drop_noops else np.arange(len(actions))  # [N]
        folder = str(shard.parent)
        path = resolve_inside(row.get("obs_path"), base=folder, root=self.root_of(shard) or folder, field="obs_path")
        if self.remote is not None:
            path = self.remote.local(path)
        chunks = action_chunks(actions[kept], action.chunk)  # [N, K, D]
        with NpzFile(path) as npz:
            sources = self._open_frames(npz, len(actions), verify)
            for i, timestep in enumerate(kept.tolist()):
                yield Sample(
                    instruction=instruction,
                    images=tuple(frames[timestep] for frames in sources),
                    action=chunks[i],
                    timestep=timestep,
                )

    def _open_frames(self, npz: NpzFile, num_actions: int, verify: bool) -> list[Frames]:
        """The colour frames [T, H, W, 3] and, where asked for, the depth frames [T, H, W]."""
        name = _first_present(npz, self.options.rgb_keys, "data.options.rgb_keys")
        rgb = npz.frames(name, dtype=np.uint8, ndim=4)
        if rgb.shape[3] != 3 or 0 in rgb.shape:
            raise DataError(f"shape {list(rgb.shape)}: [T, H, W, 3] is expected", file=npz.path, field=name)
        sources = {name: rgb}
        if self.config.image.depth:
            name = _first_present(npz, self.options.depth_keys, "data.options.depth_keys")
            sources[name] = npz.frames(name, dtype=np.uint16, ndim=3, drop_channel=True)
            if sources[name].shape[1:] != rgb.shape[1:3]:
                raise DataError(
                    f"shape {list(sources[name].shape)}: [T, H, W] with the size of the colour frames, "
                    f"{list(rgb.shape[1:3])}, is expected",
                    file=npz.path,
                    field=name,
                )
        for name, frames in sources.items():
            if len(frames) not in (num_actions, num_actions + 1):
                raise DataError(
                    f"{len(frames)} images and {num_actions} actions: as many images, or one more, are expected",
                    file=npz.path,
                    field=name,
                )
            if verify:
                npz.verify(name)
        return list(sources.values())


def _first_present(npz: NpzFile, names: tuple[str, ...], key: str) -> str:
    for name in names:
        if name in npz.names:
            return name
    raise DataError(
        f"none of the arrays {', '.join(names)} is there; there are {', '.join(npz.names) or 'none'}: name the right one "
        f"in {key}",
        file=npz.path,
    )


def _num_actions(line: bytes) -> int:
    """How many samples a line that cannot be read would have given: its bad samples keep their places, if they can be counted."""
    try:
        actions = parse_object(line).get("actions")
    except DataError:
        return 0
    return len(actions) if isinstance(actions, list) else 0


def _read_options(options: dict[str, Any]) -> ManiOpenPIOptions:
    known = {field.name for field in fields(ManiOpenPIOptions)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"mani_openpi takes {', '.join(sorted(known))}"
            raise ConfigError(f"data.options.{key}: unknown option; {hint}")
        if key == "action_dim":
            if type(value) is not int or value < 1:
                raise ConfigError(f"data.options.{key} is {value!r}: a whole number of at least 1 is expected")
            values[key] = value
            continue
        names = [value] if isinstance(value, str) else value
        if (
            not isinstance(names, list | tuple)
            or not names
            or not all(isinstance(name, str) and name for name in names)
        ):
            raise ConfigError(f"data.options.{key} is {value!r}: a list of names of arrays is expected")
        values[key] = tuple(names)
    return ManiOpenPIOptions(**values)
