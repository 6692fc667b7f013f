"""The cache of one process: an index of all segments in memory, reading, and a segment of its own to write to.

    cache = DiskCache(folder, limit_bytes)
    cache.get(key) is None                  # decode it
    cache.put(key, data)                    # from now on every process of this host finds it

Trouble of the host never reaches the caller: what cannot be read is a miss, and what cannot be written is not kept.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from loader_service.disk_cache.eviction import folder_lock, make_room
from loader_service.disk_cache.segment import (
    INDEX,
    RECORDS,
    Place,
    SegmentWriter,
    largest_record,
    read_entries,
    read_record,
)

logger = logging.getLogger(__name__)

MOST_RECORDS = 1 << 22
"""About as many records as a process remembers, some 250 bytes each: smaller ones than the limit divided by this are not kept."""
_LEAST_RECORD_BYTES = 1 << 8
_LEAST_SEGMENT_BYTES, _MOST_SEGMENT_BYTES = 1 << 18, 256 << 20
_SEGMENTS = 64
"""The limit divided by this is a segment: so much is removed at once, and so much each writer has for itself."""
_LOOK_EVERY_S = 2.0
_NOTE_EVERY_S = 60.0
_LOCK_DEADLINE_S = 2.0
_RETRY_S = 30.0


@dataclass(slots=True)
class DiskCounters:
    """What a process did since its start."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    damaged: int = 0
    """Records, or entries of an index, whose bytes are not those that were written. Such records are decoded again."""


@dataclass(slots=True)
class _Known:
    """A segment whose index was read."""

    stop: int = 0
    """Offset in the index up to which it was read."""
    keys: list[bytes] = field(default_factory=list)
    noted: float = float("-inf")
    """When its use was noted."""


class DiskCache:
    """Records by key; used by several threads at once."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._capacity = min(max(limit_bytes // _SEGMENTS, _LEAST_SEGMENT_BYTES), _MOST_SEGMENT_BYTES)
        self._least = max(limit_bytes // MOST_RECORDS, _LEAST_RECORD_BYTES)
        self.counters = DiskCounters()
        self._lock = threading.Lock()  # of everything in memory
        self._places: dict[bytes, Place] = {}
        self._known: dict[str, _Known] = {}
        self._looked = float("-inf")
        self._write_lock = threading.Lock()  # of the segment that is written
        self._writer: SegmentWriter | None = None
        self._stopped = False
        self._next_try = 0.0
        self._said: set[str] = set()
        self._shrink()
        with self._lock:
            self._look()

    def get(self, key: bytes) -> bytes | None:
        """The bytes of a record, as they were written; None: it is not here."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                self._look()
                place = self._places.get(key)
        data = None if place is None else self._read(key, place)
        with self._lock:
            if data is None:
                self.counters.misses += 1
            else:
                self.counters.hits += 1
                self.counters.read_bytes += len(data)
        return data

    def put(self, key: bytes, data: bytes) -> None:
        """Keep a record, unless it is there, too small or too large, or the disk is full."""
        if len(data) < self._least or self._stopped:
            return
        if len(data) > largest_record(self._capacity):
            self._say("large", f"a record of {len(data) >> 20} MiB is too large for it: raise loader.disk_cache_gb")
            return
        with self._lock:
            self._look()
            if key in self._places:  # another process was faster
                return
        with self._write_lock:
            self._write(key, data)

    def damaged(self, key: bytes) -> None:
        """Say that what `get` returned is no record: it is decoded again."""
        with self._lock:
            place = self._places.get(key)
        if place is not None:
            self._forget_damaged(key, place)

    def close(self) -> None:
        """Write no more. What was written stays."""
        with self._write_lock:
            self._stopped = True
            self._drop_writer()

    def _read(self, key: bytes, place: Place) -> bytes | None:
        try:
            data = read_record(self._folder, place)
        except FileNotFoundError:  # evicted since the last look
            with self._lock:
                self._forget(place.segment)
            return None
        except (OSError, MemoryError) as error:
            self._say("read", f"{place.segment}{RECORDS} cannot be read now ({error}): its records are decoded again")
            return None
        if data is None:
            self._forget_damaged(key, place)
        else:
            self._note_use(place.segment)
        return data

    def _forget_damaged(self, key: bytes, place: Place) -> None:
        with self._lock:
            self.counters.damaged += 1
            if self._places.get(key) == place:
                del self._places[key]
        self._say(
            "damaged",
            f"{place.segment}{RECORDS} is damaged at byte {place.offset}: its checksum is wrong, or it was cut short. Such "
            "records are decoded again; look at the disk if it happens often",
        )

    def _note_use(self, segment: str) -> None:
        """Set the segment's time, which decides how long it stays; at most once a minute."""
        known, now = self._known.get(segment), time.monotonic()
        if known is None or now - known.noted < _NOTE_EVERY_S:
            return
        known.noted = now
        with suppress(OSError):  # evicted since it was read, or a folder that is only read
            os.utime(self._folder / f"{segment}{RECORDS}")

    def _look(self) -> None:
        """Read what other processes wrote and removed, at most every two seconds. The lock is held."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        try:
            sizes = self._index_sizes()
        except OSError as error:
            self._say("read", f"the folder cannot be listed now ({error}): nothing new is found in it")
            return
        for gone in self._known.keys() - sizes.keys():
            self._forget(gone)
        for name in sorted(sizes):  # the newest last, so that its records win
            known = self._known.setdefault(name, _Known())
            if sizes[name] > known.stop:
                self._read_index(name, known)

    def _index_sizes(self) -> dict[str, int]:
        """Name of each segment that is whole -> bytes of its index. Raises OSError."""
        sizes: dict[str, int] = {}
        records = set()
        try:
            for entry in os.scandir(self._folder):
                if entry.name.endswith(RECORDS):
                    records.add(entry.name.removesuffix(RECORDS))
                elif entry.name.endswith(INDEX):
                    with suppress(FileNotFoundError):  # evicted at this moment
                        sizes[entry.name.removesuffix(INDEX)] = entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # nothing was ever kept, or somebody removed the folder
            return {}
        return {name: size for name, size in sizes.items() if name in records}

    def _read_index(self, name: str, known: _Known) -> None:
        try:
            entries = read_entries(self._folder, name, known.stop)
        except FileNotFoundError:
            return  # removed at this moment
        except OSError as error:
            self._say("read", f"{name}{INDEX} cannot be read now ({error}): its records are decoded again")
            return
        known.stop = entries.stop
        for key, place in entries.places:
            self._places[key] = place
            known.keys.append(key)
        self.counters.damaged += entries.num_damaged
        if entries.num_damaged:
            self._say("damaged", f"{name}{INDEX} is damaged: what it named is decoded again")

    def _forget(self, name: str) -> None:
        """A segment is gone. The lock is held."""
        known = self._known.pop(name, None)
        for key in () if known is None else known.keys:
            if (place := self._places.get(key)) is not None and place.segment == name:
                del self._places[key]

    def _write(self, key: bytes, data: bytes) -> None:
        """Append the record. The write lock is held."""
        if self._stopped:
            return
        try:
            if self._writer is not None and self._is_gone(self._writer):
                self._drop_writer()
            if self._writer is None or not self._writer.has_room(len(data)):
                self._drop_writer()
                self._writer = self._begin()
            if self._writer is None:
                return
            place = self._writer.append(key, data)
        except (OSError, MemoryError) as error:
            self._stopped = True
            self._drop_writer()
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or "out of memory"
            self._say(
                "write",
                f"it cannot be written ({reason}): nothing more is kept until this loader is started again, and batches "
                "stay the same. Free space, lower loader.disk_cache_gb, or name another folder in loader.disk_cache_dir",
            )
            return
        with self._lock:
            self.counters.written_bytes += len(data)
            self._places[key] = place
            known = self._known.setdefault(place.segment, _Known())
            known.keys.append(key)
            known.stop = self._writer.index_bytes

    def _begin(self) -> SegmentWriter | None:
        """A new segment; None while segments of other processes, which are being written, take all the room. Raises OSError."""
        if time.monotonic() < self._next_try:
            return None
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with folder_lock(self._folder, _LOCK_DEADLINE_S) as has_lock:
            if has_lock and make_room(self._folder, self._limit, self._capacity):
                return SegmentWriter(self._folder, self._capacity)
        self._next_try = time.monotonic() + _RETRY_S
        if has_lock:
            self._say("room", "all of loader.disk_cache_gb is being written by other processes: raise it")
        return None

    def _is_gone(self, writer: SegmentWriter) -> bool:
        """Whether somebody removed the segment that is written, with the whole folder perhaps."""
        with self._lock:
            return writer.name not in self._known and not (self._folder / f"{writer.name}{INDEX}").exists()

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _shrink(self) -> None:
        """Remove what is beyond the limit, which may have been lowered."""
        with suppress(OSError), folder_lock(self._folder, 0.0) as has_lock:  # OSError: none yet, or only to be read
            if has_lock:
                make_room(self._folder, self._limit, 0)

    def _say(self, kind: str, message: str) -> None:
        """Log a message of each kind once."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("the cache of encoded records in %s: %s", self._folder, message)
