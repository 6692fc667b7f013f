"""Which segments are removed: whole ones, those used longest ago first, never one that a living process writes.

Call `make_room` under `folder_lock`. A segment that is being written counts with its whole capacity. So a writer asks for room
once per segment, and all writers together stay within the limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loader_service.disk_cache.segment import INDEX, RECORDS, read_capacity
from stoker_proto.host.files import open_lock_file, try_lock

MOST_SEGMENTS = 1024
"""Runs that store little make many small segments: beyond this number the oldest go."""
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment as it lies in the folder."""

    name: str
    size_bytes: int
    """Of both files; the capacity, if it is being written."""
    used_ns: int
    """When it was last written or read."""
    is_written: bool
    """A living process appends to it."""


@contextmanager
def folder_lock(folder: Path, deadline_s: float) -> Iterator[bool]:
    """Hold the folder's lock in the block; False if another process held it until the deadline. Raises OSError."""
    descriptor = open_lock_file(folder / "lock")
    try:
        end = time.monotonic() + deadline_s
        while not (has_it := try_lock(descriptor)) and time.monotonic() < end:
            time.sleep(_POLL_S)
        yield has_it
    finally:
        os.close(descriptor)


def list_segments(folder: Path) -> list[Segment]:
    """All segments, those used longest ago first. Raises OSError."""
    names = {entry.name.rpartition(".")[0] for entry in os.scandir(folder) if entry.name.endswith((RECORDS, INDEX))}
    found = [segment for name in names if (segment := _look(folder, name)) is not None]
    return sorted(found, key=lambda segment: (segment.used_ns, segment.name))


def make_room(folder: Path, limit_bytes: int, needed_bytes: int) -> bool:
    """Remove segments until `needed_bytes` more fit into the limit; False if those that are being written leave no room."""
    segments = list_segments(folder)
    total, count = sum(segment.size_bytes for segment in segments), len(segments)
    for segment in segments:
        if total + needed_bytes <= limit_bytes and count + bool(needed_bytes) <= MOST_SEGMENTS:
            break
        if segment.is_written:
            continue
        for kind in (INDEX, RECORDS):  # in this order: what has no index is served by nobody
            (folder / f"{segment.name}{kind}").unlink(missing_ok=True)
        total, count = total - segment.size_bytes, count - 1
    return total + needed_bytes <= limit_bytes


def _look(folder: Path, name: str) -> Segment | None:
    """None if it is removed at this moment."""
    is_written = _is_locked(folder / f"{name}{RECORDS}")  # before its size: a segment that was closed grows no more
    size = used = 0
    for kind in (RECORDS, INDEX):
        with suppress(FileNotFoundError):  # half of a segment may be left by a process that was killed
            status = (folder / f"{name}{kind}").stat()
            size, used = size + status.st_size, max(used, status.st_mtime_ns)
    if not used:
        return None
    if is_written:
        with suppress(FileNotFoundError):
            size = max(size, read_capacity(folder, name))
    return Segment(name, size, used, is_written)


def _is_locked(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor, shared=True)
    finally:
        os.close(descriptor)
