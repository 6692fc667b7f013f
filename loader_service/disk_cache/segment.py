"""A segment: two files that one process appends to, and that every process of the host reads.

    00000001764500000000-5f0c3a91.records    the bytes of records, one after another
    00000001764500000000-5f0c3a91.index      head: magic, capacity; then one entry for each record, written after its bytes
    head, 16 bytes                           magic[8], capacity of both files in bytes
    entry, 40 bytes                          key[16], offset, size, CRC-32 of the record's bytes, CRC-32 of the entry

A process that is killed leaves bytes without an entry, or a part of an entry: neither is served. The name begins with the time in
ms, so a later segment sorts after an earlier one. The writer holds a lock on `.records` until its process ends, however it ends.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import deflate

from stoker_proto.host.files import try_lock

RECORDS, INDEX = ".records", ".index"
KEY_BYTES = 16
_MAGIC = b"stokseg1"
_HEAD = struct.Struct("<8sQ")
_ENTRY = struct.Struct("<16sQQLL")
_ENTRY_BODY = _ENTRY.size - 4
_MOST_INDEX_BYTES = 1 << 28


class Place(NamedTuple):
    """Where the bytes of a record lie."""

    segment: str
    offset: int
    size: int
    crc: int


class Entries(NamedTuple):
    """What was read of an index."""

    places: list[tuple[bytes, Place]]
    """(key, place), in the order of writing."""
    stop: int
    """Offset up to which the index was read."""
    num_damaged: int
    """Entries whose bits have changed."""


def read_entries(folder: Path, name: str, start: int) -> Entries:
    """Entries of a segment's index from offset `start` (0: from its beginning) on.

    A part of an entry at the end is left for the next call. Raises OSError."""
    descriptor = os.open(folder / f"{name}{INDEX}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if start == 0:
            head = os.pread(descriptor, _HEAD.size, 0)
            if len(head) < _HEAD.size:
                return Entries([], 0, 0)
            if head[: len(_MAGIC)] != _MAGIC:
                return Entries([], _MOST_INDEX_BYTES, 1)  # nothing more is read of it
            start = _HEAD.size
        data = os.pread(descriptor, max(0, _MOST_INDEX_BYTES - start), start)
    finally:
        os.close(descriptor)
    places, damaged = [], 0
    stop = len(data) - len(data) % _ENTRY.size
    for at in range(0, stop, _ENTRY.size):
        key, offset, size, crc, own_crc = _ENTRY.unpack_from(data, at)
        if deflate.crc32(data[at : at + _ENTRY_BODY]) == own_crc:
            places.append((key, Place(name, offset, size, crc)))
        else:
            damaged += 1
    return Entries(places, start + stop, damaged)


def read_capacity(folder: Path, name: str) -> int:
    """Bytes that the writer of a segment may fill at most; 0 where the index does not say. Raises OSError."""
    descriptor = os.open(folder / f"{name}{INDEX}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        head = os.pread(descriptor, _HEAD.size, 0)
    finally:
        os.close(descriptor)
    if len(head) < _HEAD.size or head[: len(_MAGIC)] != _MAGIC:
        return 0
    return int(_HEAD.unpack(head)[1])


def read_record(folder: Path, place: Place) -> bytes | None:
    """The bytes of a record; None where they are not those that were written. Raises OSError."""
    descriptor = os.open(
        folder / f"{place.segment}{RECORDS}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    )
    try:
        if place.offset + place.size > os.fstat(descriptor).st_size:  # before memory is allocated for it
            return None
        data = os.pread(descriptor, place.size, place.offset)
    finally:
        os.close(descriptor)
    return data if len(data) == place.size and deflate.crc32(data) == place.crc else None


class SegmentWriter:
    """Appends records to a new segment. Not safe to use from several threads at once."""

    def __init__(self, folder: Path, capacity: int) -> None:
        """Make both files and lock the segment. Raises OSError, also on a file system without locks."""
        self.name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        self._capacity = capacity
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._files = [folder / f"{self.name}{kind}" for kind in (RECORDS, INDEX)]
        self._records = os.open(self._files[0], flags, 0o600)
        self._index = -1
        try:
            try_lock(self._records)
            self._index = os.open(self._files[1], flags, 0o600)
            _write(self._index, _HEAD.pack(_MAGIC, capacity), 0)
        except BaseException:
            self.close()
            for file in self._files:
                file.unlink(missing_ok=True)
            raise
        self._records_end, self._index_end = 0, _HEAD.size

    def has_room(self, size: int) -> bool:
        """Whether a record of `size` bytes fits."""
        return self._records_end + size + self._index_end + _ENTRY.size <= self._capacity

    @property
    def index_bytes(self) -> int:
        """Of the index so far."""
        return self._index_end

    def append(self, key: bytes, data: bytes) -> Place:
        """Write a record. Raises OSError (a full disk, say); then the segment ends before the record, as it did."""
        place = Place(self.name, self._records_end, len(data), deflate.crc32(data))
        body = _ENTRY.pack(key, place.offset, place.size, place.crc, 0)[:_ENTRY_BODY]
        try:
            _write(self._records, data, self._records_end)
            _write(self._index, body + deflate.crc32(body).to_bytes(4, "little"), self._index_end)
        except OSError:
            for descriptor, end in ((self._index, self._index_end), (self._records, self._records_end)):
                with suppress(OSError):  # the bytes have no entry, so they are only room that is lost
                    os.ftruncate(descriptor, end)
            raise
        self._records_end += len(data)
        self._index_end += _ENTRY.size
        return place

    def close(self) -> None:
        """Close both files, which frees the lock. A second call does nothing."""
        for descriptor in (self._index, self._records):
            if descriptor >= 0:
                os.close(descriptor)
        self._index = self._records = -1


def largest_record(capacity: int) -> int:
    """Bytes of the largest record that an empty segment of this capacity holds."""
    return capacity - _HEAD.size - _ENTRY.size


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)  # a full disk may take a part first
