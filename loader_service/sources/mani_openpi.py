"""`mani_openpi`: ManiSkill demonstrations as JSONL + NPZ, one trajectory per line.

    {"obs_path": "traj_000123/obs.npz", "task": "PutOnPlateInScene25Main-v3", "actions": [[0.12, -0.07, ...], ...]}

`obs_path` is relative to the JSONL file. The NPZ holds `rgb` uint8[T, H, W, 3] and, where data.image.depth asks for it, `depth`
uint16[T, H, W] or [T, H, W, 1] in mm; options name further cameras. An `instruction` in the row overrides the task table. T
images belong to T actions: image t was taken just before action t. T + 1 images are legal; the last one has no action.
States are `states` [T or T + 1][S] in the row, or an array of the NPZ. A row whose `timesteps` [T] are not 0, 1, 2 ... holds
a part of its episode (frames that were not rendered are left out): it serves single actions, not chunks. Sample t is timestep
t: its images (with data.options.image_history those before it too), the instruction, the state, and actions t, t+1, ...,
t+K-1 (K = data.action.chunk; after the end the last action is repeated, and `action_is_pad` says where).

Letters: T timesteps, D dimensions of an action, S numbers of a state, K actions in a chunk, N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.paths import resolve_inside
from loader_service.remote.url import is_url
from loader_service.shards import EntryShards
from loader_service.sources.actions import is_noop, parse_actions, parse_states
from loader_service.sources.base import BaseSFTDataset, RecordContent, Sample, ScannedRecord
from loader_service.sources.jsonl import cut_lines, iter_lines, line_number, parse_object, read_line
from loader_service.sources.mani_arrays import open_frames, read_auxiliary, read_measurements, read_states
from loader_service.sources.mani_options import read_mani_options
from loader_service.sources.named_files import UNREADABLE, NamedFiles
from loader_service.sources.npz import NpzFile
from loader_service.sources.tasks import instruction_of, load_task_table
from loader_service.sources.trajectory import Trajectory
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, DataError, located
from stoker_proto.hashing import fingerprint

_MODE_KEY = b"control_mode"
_LOOKED_AT = 1 << 20  # bytes of a shard, which are read at once anyway
_SUCCESS = ("success", "is_success", "succeeded")
_FAILED_NOTE = "its row says that it did not succeed, and it is trained: remove such lines if only successes are meant"
_UNREADABLE_NOTE = "its NPZ cannot be opened: training will fail on it, or skip it"


class ManiOpenPIDataset(BaseSFTDataset):
    """Trajectories of a JSONL file with one NPZ each."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.options = read_mani_options(config.options)
        if self.options.views is not None and config.image.depth:
            raise ConfigError(
                "data.options.views cuts colour frames: set data.image.depth to false, or leave views out"
            )
        self._wants_states = config.state == "text" or "state_keys" in config.options
        if config.action.drop_noops and self.options.action_dim != 7:
            raise ConfigError(
                f"data.action.drop_noops is on and data.options.action_dim is {self.options.action_dim}: what moves "
                "nothing is defined for 7 dimensions (dxyz, drot, gripper); turn it off"
            )
        self.tasks = load_task_table(config.task_table)
        self._first: tuple[Path, str] | None = None
        """The first file with a control mode among the entries located so far, of both splits, and this mode."""

    def scan_identity(self) -> dict[str, Any]:
        """Adds the states, if the scan reads them; and under policy `skip` the task table, because a task without an instruction
        is a bad record."""
        identity = super().scan_identity()
        if self.config.state == "text":
            identity["state"] = "text"
        return identity if self.config.on_bad_sample == "fail" else {**identity, "tasks": fingerprint(self.tasks)}

    def read_identity(self) -> dict[str, Any]:
        """Adds the task table, which decides the instructions."""
        return {**super().read_identity(), "tasks": fingerprint(self.tasks)}

    def beside(self, shards: Sequence[Path]) -> str:
        """Of the task table."""
        return fingerprint(self.tasks)

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        """One pass over the lines. Of each local NPZ the directory is read. One behind a URL is opened only for states that are
        needed (`data.state: text`) and not in the row."""
        return self.scan_part(shard, 0, shard.stat().st_size)

    def locate(self, path: str) -> EntryShards:
        """Raises DataError too where files that lie here begin with other control modes."""
        shards = super().locate(path)
        if self.remote is not None and is_url(path):
            return shards  # each would be fetched
        for shard in shards.paths:
            mode = _first_mode(shard)
            if mode is not None:
                self._first = self._first or (shard, mode)
                _check_mode(mode, self._first[1], str(self._first[0]), file=str(shard))
        return shards

    def cut(self, shard: Path, part_bytes: int) -> list[int]:
        """At the ends of lines."""
        return cut_lines(shard, part_bytes)

    def scan_part(self, shard: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        """The trajectories whose lines begin in bytes [start, stop)."""
        mode = _first_mode(shard)
        for offset, line in iter_lines(shard, start, stop):
            try:
                row = parse_object(line)
                mode = mode or _mode_of(row)
                yield self._scan_row(shard, offset, line, row, mode)
            except DataError as error:
                located = self._located(error, shard, offset)
                if self.config.on_bad_sample == "fail":
                    raise located from error
                yield ScannedRecord(offset=offset, size=len(line), num_samples=_num_actions(line), error=str(located))

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        """The trajectory's samples, one at a time. A bad trajectory fails before its first sample, if possible."""
        return self._read_record(shard, offset, size, verify=False)

    def content(self, shard: Path, offset: int, size: int) -> RecordContent | None:
        """The line, and the NPZ's directory, size and time. Not known behind a URL, where each NPZ would be fetched for it."""
        if self.remote is not None and self.remote.holds(shard):
            return None
        line = read_line(shard, offset, size)
        with NpzFile(self._npz_path(parse_object(line), shard)) as npz:
            return RecordContent(line + npz.size_bytes.to_bytes(8, "little"), npz.named_files)

    def verify(self, shard: Path, offset: int, size: int) -> int:
        """Reads every frame, and compares the CRC of stored members too."""
        return sum(1 for _ in self._read_record(shard, offset, size, verify=True))

    def where(self, shard: Path, offset: int) -> tuple[str, str]:
        """With its line, as editors know it."""
        return f"{shard}:{line_number(shard, offset)}", ""

    def _located(self, error: DataError, shard: Path, offset: int) -> DataError:
        """The same error with the JSONL line that it belongs to."""
        line, _ = self.where(shard, offset)
        if error.file and error.file != str(shard):
            return DataError(error.reason, file=error.file, record=line, field=error.field)
        return DataError(error.reason, file=line, field=error.field)

    def _scan_row(self, shard: Path, offset: int, line: bytes, row: dict[str, Any], mode: str | None) -> ScannedRecord:
        _check_mode(_mode_of(row), mode, "the first row that names one")
        if not isinstance(row.get("obs_path"), str):
            raise DataError(f"{row.get('obs_path')!r}: the path of an NPZ is expected", field="obs_path")
        actions = parse_actions(row.get("actions"), self.options.action_dim)
        self._check_whole(row)
        instruction_of(row, self.tasks)
        states = self._row_states(row, len(actions))
        files: NamedFiles | None = None
        notes: tuple[str, ...] = ()
        if states is None and self.config.state == "text":  # their scale is fitted on what the scan finds
            with NpzFile(self._npz_path(row, shard)) as npz:
                states = read_states(npz, self.options.state_keys, len(actions))
        if self.remote is None or not self.remote.holds(shard):  # each remote file would be fetched for it
            files, notes = self._scan_npz(row, shard)
        if any(isinstance(value := row.get(name), bool | int | float) and not value for name in _SUCCESS):
            notes = (*notes, _FAILED_NOTE)
        states = None if states is None else states[: len(actions)]  # the state after the last action is in no sample
        if self.config.action.drop_noops:
            actions = actions[~is_noop(actions)]
        return ScannedRecord(
            offset=offset,
            size=len(line),
            num_samples=len(actions),
            actions=actions,
            states=states,
            files=files,
            notes=notes if len(actions) else (),
        )

    def _scan_npz(self, row: dict[str, Any], shard: Path) -> tuple[NamedFiles, tuple[str, ...]]:
        """The entries of the NPZ's directory, and a note if the file cannot be opened: `read` then raises the error."""
        try:
            with NpzFile(self._npz_path(row, shard)) as npz:
                return npz.named_files, ()
        except DataError:
            return UNREADABLE, (_UNREADABLE_NOTE,)

    def _read_record(self, shard: Path, offset: int, size: int, *, verify: bool) -> Iterator[Sample]:
        """The samples. An error names the line of the JSONL."""
        try:
            row = parse_object(read_line(shard, offset, size))
            actions = parse_actions(row.get("actions"), self.options.action_dim)  # [T, D]
            self._check_whole(row)
            instruction = instruction_of(row, self.tasks)
            states = self._row_states(row, len(actions))  # [T or T + 1, S]
            with NpzFile(self._npz_path(row, shard)) as npz:
                streams = open_frames(npz, self.options, len(actions), depth=self.config.image.depth, verify=verify)
                if states is None and self._wants_states:
                    states = read_states(npz, self.options.state_keys, len(actions), verify=verify)
                trajectory = Trajectory(
                    actions=actions,
                    states=states,
                    instructions=[instruction] * len(actions),
                    drop_noops=self.config.action.drop_noops,
                    chunk_offsets=np.arange(self.config.action.chunk),
                    history_offsets=np.array(self.options.image_history, np.int64),
                    files=npz.named_files,
                )
                samples = trajectory.samples(lambda wanted: [map(frames.__getitem__, wanted) for frames in streams])
                yield from self._completed(samples, npz, len(actions), verify=verify)
                npz.check_rest()
        except DataError as error:
            raise self._located(error, shard, offset) from error

    def _completed(
        self, samples: Iterator[Sample], npz: NpzFile, num_actions: int, *, verify: bool
    ) -> Iterator[Sample]:
        """The samples with the views of their frames and with what training predicts beside the actions."""
        if self.options.views is None and not self.options.auxiliary_keys:
            return samples
        return self._complete(samples, npz, num_actions, verify=verify)

    def _complete(self, samples: Iterator[Sample], npz: NpzFile, num_actions: int, *, verify: bool) -> Iterator[Sample]:
        options, measured, auxiliary = self.options, {}, None
        if options.views is not None:
            measured = read_measurements(npz, options.views.needed, num_actions, verify=verify)
        if options.auxiliary_keys:
            auxiliary = read_auxiliary(npz, options.auxiliary_keys, num_actions, verify=verify)
        for sample in samples:
            t, images = sample.timestep, sample.images
            if options.views is not None:
                with located(file=npz.path, field=f"timestep {t}"):
                    images = options.views.cut(images[0], {name: values[t] for name, values in measured.items()})
            yield dataclasses.replace(sample, images=images, auxiliary=None if auxiliary is None else auxiliary[t])

    def _check_whole(self, row: dict[str, Any]) -> None:
        """Raises DataError where consecutive timesteps are needed and the row leaves some out."""
        timesteps = row.get("timesteps")
        if timesteps is None or timesteps == list(range(len(row["actions"]))):
            return
        if self.config.action.chunk > 1 or self.options.image_history != (0,):
            raise DataError(
                "the row leaves out timesteps whose frames were not rendered, so it has no consecutive actions or frames: set "
                "data.action.chunk to 1 and leave image_history out, or collect with --render-share 1",
                field="timesteps",
            )

    def _row_states(self, row: dict[str, Any], num_actions: int) -> NDArray[np.float32] | None:
        """float32[T or T + 1, S]; None where the row has none, or nobody asked for them."""
        if not self._wants_states or row.get("states") is None:
            return None
        return parse_states(row["states"], num_actions)

    def _npz_path(self, row: dict[str, Any], shard: Path) -> str:
        folder = str(shard.parent)
        path = resolve_inside(row.get("obs_path"), base=folder, root=self.root_of(shard) or folder, field="obs_path")
        return path if self.remote is None else self.remote.local(path)


def _mode_of(row: dict[str, Any]) -> str | None:
    """What the numbers of an action mean, where the row says it."""
    mode = row.get("control_mode")
    return mode if isinstance(mode, str) and mode else None


def _first_mode(shard: Path) -> str | None:
    """Of the first row that names one; None where none does in the first MiB, or a line cannot be read (the scan says why)."""
    try:
        for _, line in iter_lines(shard, 0, _LOOKED_AT):
            if _MODE_KEY in line and (mode := _mode_of(parse_object(line))) is not None:
                return mode
    except DataError:
        return None
    return None


def _check_mode(mode: str | None, first: str | None, where: str, *, file: str = "") -> None:
    if mode is not None and first is not None and mode != first:
        raise DataError(
            f"{mode}, and {where} has {first}: the same numbers mean other motions; make each a source of its own (data.sources)",
            file=file,
            field="control_mode",
        )


def _num_actions(line: bytes) -> int:
    """Samples that a bad line would have, if they can be counted: they keep their places."""
    try:
        actions = parse_object(line).get("actions")
    except DataError:
        return 0
    return len(actions) if isinstance(actions, list) else 0
