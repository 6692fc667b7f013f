"""One part of a shard: hashed, scanned, and kept in the cache under the name of its content.

A part is a range of bytes; parts are scanned in any order by any number of processes. What a scan found is stored under a key of
the part's bytes and of every setting that decides what a scan finds. So an interrupted `loader-prepare` resumes with the parts
that are missing, and of changed data only the changed parts are scanned again.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loader_service.cache_folder import save_arrays, writable
from loader_service.manifest import FORMAT_VERSION
from loader_service.pieces.text_samples import Counting
from loader_service.prepare.actions_state import ActionCounter, GatheredActions, actions_to_keep
from loader_service.shards import Stamp
from loader_service.sources.base import BaseSFTDataset, ScannedRecord
from loader_service.sources.fields import UNREAD
from loader_service.sources.lfs import refuse_pointer
from stoker_proto.errors import DataError, StokerError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.trouble import check_host

logger = logging.getLogger(__name__)

PART_BYTES = 16 << 20
_BLOCK = 1 << 20
_PREFIXES = {"actions": "actions_", "states": "states_"}  # of their arrays in a part's file
_MAX_ERRORS = 20  # examples kept of the bad records of a part
_MAX_NOTES = 64  # kinds of notes told apart
_MAX_UNREAD = 24  # of these, fields that are not read: rows of a wide table leave room for what was mended


_OTHER_FIELDS = f"{UNREAD}other fields"


@dataclass(frozen=True, slots=True)
class RemotePart:
    """What a part of a remote shard needs besides."""

    total: int
    """Bytes of all shards of the entry, for `actions_to_keep`."""
    copy: tuple[int, int] = (0, 0)
    """Size and inode of the copy that is scanned."""


@dataclass(frozen=True, slots=True)
class PartTask:
    """Bytes [start, stop) of a shard, to be hashed unless `digest` is known, and scanned unless the cache holds them."""

    shard: str
    start: int
    stop: int
    stamp: Stamp
    digest: str | None
    keep: int
    """Actions of this part that the sample of the fit needs at most."""
    chunk: int
    """Timesteps of the chunks that are sampled; 0: none (`actions_state.sampled_chunk`)."""
    identity: str
    """`EntryJob.cache_identity`."""
    folder: str
    """`parts` of the cache."""
    remote: RemotePart | None = None
    """Set for a shard that is fetched when it is scanned."""
    rescan: bool = False
    """Do not use the cached scan: files that the records name may have changed."""

    def cache_path(self, digest: str) -> Path:
        """Where the scan of these bytes is kept."""
        key = fingerprint([FORMAT_VERSION, self.identity, digest])[:32]
        return Path(self.folder) / key[:2] / f"{key}.npz"


@dataclass(frozen=True, slots=True)
class Part:
    """What a scan found in one part. R records."""

    offsets: NDArray[np.int64]  # [R], relative to the part
    sizes: NDArray[np.uint32]  # [R]
    num_samples: NDArray[np.uint32]  # [R]
    num_tokens: NDArray[np.uint32]  # [R]
    files: NDArray[np.int64] | None  # [R, 2], `NamedFiles` of each record; None where no record names a file
    row_tokens: NDArray[np.uint32] | None  # [S] of all samples; None where num_tokens says it
    num_bad: int
    num_bad_samples: int
    errors: tuple[str, ...]
    notes: Mapping[str, int]
    """What was mended or left out -> in how many records."""
    actions: GatheredActions | None
    states: GatheredActions | None


class PartResult(NamedTuple):
    """A part that was scanned."""

    task: PartTask
    digest: str
    """Of its bytes."""
    num_records: int
    files: str
    """Digest of the files that its records name; empty without any."""
    num_actions: int
    num_states: int


def hash_part(_dataset: BaseSFTDataset, task: PartTask) -> str:
    """Digest of the part's bytes. Raises DataError."""
    try:
        return _digest(task)
    except OSError as error:
        raise _unreadable(error, task) from error


def run_task(dataset: BaseSFTDataset, task: PartTask, *, counting: Counting | None = None) -> list[PartResult]:
    """Scan the part into the cache. Raises DataError. A new remote shard comes as one part, and is cut here.

    counting: how text becomes rows, where they are counted; part of the task's identity.
    """
    if task.remote is None:
        with dataset.reading():
            return [_run(dataset, task, counting)]
    if task.digest is not None and (part := _cached(task, task.digest)) is not None:
        return [_result(task, task.digest, part)]
    with dataset.reading():
        shard = dataset.local(Path(task.shard))
        status = shard.stat()
        remote = replace(task.remote, copy=(status.st_size, status.st_ino))
        if task.digest is not None:
            return [_run(dataset, replace(task, remote=remote), counting)]
        bounds = dataset.cut(shard, PART_BYTES)
        parts = [
            replace(task, start=a, stop=b, keep=actions_to_keep(b - a, remote.total), remote=remote)
            for a, b in itertools.pairwise(bounds)
        ]
        return [_run(dataset, part, counting) for part in parts]


def _run(dataset: BaseSFTDataset, task: PartTask, counting: Counting | None) -> PartResult:
    try:
        if task.start == 0:
            refuse_pointer(task.shard)  # of any dataset: one that reads plain text would learn it
        digest = task.digest or _digest(task)
        part = _cached(task, digest)
        if part is None:
            part = _scan(dataset, task, digest, counting)
            _save(task.cache_path(digest), part, task.keep)
    except OSError as error:
        raise _unreadable(error, task) from error
    except DataError as error:
        check_host(error, task.shard)  # a dataset class may wrap it
        raise
    except StokerError:
        raise
    except Exception as error:  # any exception of a user's dataset class becomes an error of this shard
        check_host(error, task.shard)
        logger.exception("dataset class %s failed on %s", type(dataset).__name__, task.shard)
        reason = f"{type(dataset).__name__}.scan failed: {type(error).__name__}: {error}"
        raise DataError(reason, file=task.shard) from error
    return _result(task, digest, part)


def _unreadable(error: OSError, task: PartTask) -> DataError:
    """Raises HostError for trouble of the host."""
    check_host(error, task.shard)
    return DataError(f"the shard cannot be read ({error.strerror or error})", file=task.shard)


def _cached(task: PartTask, digest: str) -> Part | None:
    return None if task.rescan else load_part(task.cache_path(digest), task.keep, task.chunk)


def _result(task: PartTask, digest: str, part: Part) -> PartResult:
    """Times of change are this host's own, and do not enter the digest."""
    contents = b"" if part.files is None else part.files[:, 0].astype("<i8").tobytes()
    files = hashlib.blake2b(contents, digest_size=16).hexdigest() if contents else ""
    actions, states = (0 if found is None else found.statistics.count for found in (part.actions, part.states))
    return PartResult(task, digest, len(part.offsets), files, actions, states)


def load_part(path: Path, keep: int, chunk: int) -> Part | None:
    """The cached part; None if there is none, or it is damaged, or keeps too few actions."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            found: dict[str, GatheredActions | None] = {}
            for what, prefix in _PREFIXES.items():
                found[what] = None
                if f"{prefix}count" in saved.files:
                    arrays = {name.removeprefix(prefix): saved[name] for name in saved.files if name.startswith(prefix)}
                    found[what] = GatheredActions.from_arrays(arrays, keep, chunk if what == "actions" else 0)
                    if found[what] is None:
                        return None
            return Part(
                saved["offsets"],
                saved["sizes"],
                saved["num_samples"],
                saved["num_tokens"],
                saved["files"] if "files" in saved.files else None,
                saved["row_tokens"] if "row_tokens" in saved.files else None,
                num_bad := int(saved["num_bad"]),
                int(saved["num_bad_samples"]) if num_bad else 0,  # one from before these were counted is scanned again
                tuple(map(str, saved["errors"].tolist())),
                dict(zip(map(str, saved["notes"].tolist()), saved["note_counts"].tolist(), strict=True)),
                found["actions"],
                found["states"],
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, DataError) as error:
        check_host(error, str(path))
        return None  # damaged, e.g. by a full disk: it is scanned and written anew


def _save(path: Path, part: Part, keep: int) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "offsets": part.offsets,
        "sizes": part.sizes,
        "num_samples": part.num_samples,
        "num_tokens": part.num_tokens,
        "num_bad": np.array(part.num_bad),
        "num_bad_samples": np.array(part.num_bad_samples),
        "errors": np.array(part.errors, dtype=np.str_),
        "notes": np.array(list(part.notes), dtype=np.str_),
        "note_counts": np.array(list(part.notes.values()), dtype=np.int64),
    }
    if part.files is not None:
        arrays["files"] = part.files
    if part.row_tokens is not None:
        arrays["row_tokens"] = part.row_tokens
    for what, prefix in _PREFIXES.items():
        gathered: GatheredActions | None = getattr(part, what)
        if gathered is not None:
            arrays.update({f"{prefix}{name}": values for name, values in gathered.to_arrays(keep).items()})
    with writable(path.parent.parent.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, arrays)


def _digest(task: PartTask) -> str:
    """BLAKE2b of the part's bytes, 128 bits."""
    digest = hashlib.blake2b(digest_size=16)
    left = task.stop - task.start
    with open(task.shard, "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered, hashed block by block
        file.seek(task.start)
        block = bytearray(min(_BLOCK, max(left, 1)))
        view = memoryview(block)
        while left > 0:
            count = file.readinto(view[: min(left, _BLOCK)])
            if not count:
                break
            digest.update(view[:count])
            left -= count
    _check_unchanged(task)
    return digest.hexdigest()


def _check_unchanged(task: PartTask) -> None:
    stamp = Stamp.of(Path(task.shard))
    is_same = stamp == task.stamp if task.remote is None else (stamp.size, stamp.inode) == task.remote.copy
    if not is_same:
        raise DataError("it changed while it was scanned: run loader-prepare again when it is written", file=task.shard)


def _scan(dataset: BaseSFTDataset, task: PartTask, digest: str, counting: Counting | None) -> Part:
    columns = array("q")  # 32 bytes a record: what cannot be cut is one part, however many records it has
    files = array("q")  # `NamedFiles` of each record, from the first on that names one
    row_tokens, is_divided = array("I"), False
    errors: list[str] = []
    notes: Counter[str] = Counter()
    num_bad = num_bad_samples = 0
    actions = ActionCounter(task.shard, int(digest[:16], 16), task.chunk)
    states = ActionCounter(task.shard, int(digest[:16], 16), what="states")
    records: Iterable[ScannedRecord] = dataset.scan_part(Path(task.shard), task.start, task.stop)
    if counting is not None:
        records = counting.counter(dataset).count(Path(task.shard), records)
    for record in records:
        _check_record(dataset, task, record)
        columns.extend((record.offset - task.start, record.size, record.num_samples, record.num_tokens))
        if files or record.files is not None:
            files.frombytes(bytes(len(columns) // 4 * 16 - 16 - len(files) * 8))  # records before it name no file
            files.extend(record.files or (0, 0))
        if counting is not None:  # of a bad record, or one whose rows nobody counted, one token for each
            row_tokens.extend(record.row_tokens or (1,) * record.num_samples)
            is_divided = is_divided or bool(record.row_tokens)
        if record.notes:
            count_notes(notes, dict.fromkeys(record.notes, 1))
        if record.error is not None:
            num_bad += 1
            num_bad_samples += max(record.num_samples, 1)
            if len(errors) < _MAX_ERRORS:
                errors.append(record.error)
            continue
        if record.actions is not None:
            actions.add(record.actions, record.chunk_offsets)
        if record.states is not None:
            states.add(record.states)
    _check_unchanged(task)
    table = np.frombuffer(columns, dtype=np.int64).reshape(-1, 4)
    return Part(
        table[:, 0].copy(),
        table[:, 1].astype(np.uint32),
        table[:, 2].astype(np.uint32),
        table[:, 3].astype(np.uint32),
        np.frombuffer(files, dtype=np.int64).reshape(-1, 2) if files else None,
        np.array(row_tokens, np.uint32) if is_divided else None,
        num_bad,
        num_bad_samples,
        tuple(errors),
        notes,
        actions.finish(),
        states.finish(),
    )


def count_notes(notes: Counter[str], more: Mapping[str, int]) -> None:
    """Add counts. Beyond a number of different notes they count as "other", so that memory is bounded."""
    for note, count in more.items():
        if note not in notes:
            if note.startswith(UNREAD) and sum(known.startswith(UNREAD) for known in notes) >= _MAX_UNREAD:
                note = _OTHER_FIELDS
            elif len(notes) >= _MAX_NOTES:
                note = "other"
        notes[note] += count


def _check_record(dataset: BaseSFTDataset, task: PartTask, record: ScannedRecord) -> None:
    """Raises DataError for values that the columns cannot hold, which a user's dataset class may return."""
    limits = {"offset": 1 << 63, "size": 1 << 32, "num_samples": 1 << 32, "num_tokens": 1 << 32}
    for name, limit in limits.items():
        value = getattr(record, name)
        if not 0 <= value < limit:
            raise DataError(
                f"{type(dataset).__name__}.scan gave {name} {value}: 0 to {limit - 1} can be kept",
                file=task.shard,
                record=f"at offset {record.offset}",
            )
