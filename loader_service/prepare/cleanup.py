"""Removes files of the cache folder that no run has used for a month, while no process uses the folder.

    in-use     every process that uses manifests of the folder holds a shared lock on it until it ends, because restarted workers
               map the same files, however old these are
    tidied     its time is the time of the last clean-up

A file is used when a `loader-prepare` or a loader finds it valid at its start. After that it removes what is old. Everything can
be computed again at the cost of a scan.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import orjson

from loader_service.cache_folder import locked, writable
from stoker_proto.errors import ConfigError, DeadlineError
from stoker_proto.host.files import try_lock

logger = logging.getLogger(__name__)

UNUSED_S = 30 * 86400.0
_DAY_S = 86400.0
_LOCK_DEADLINE_S, _SHARE_DEADLINE_S = 1.0, 60.0
_MOST_HELD = 64  # a process reads a few folders
_held: dict[Path, int] = {}  # cache folder -> descriptor, open until this process ends


def use(root: Path) -> None:
    """Hold the shared lock until this process ends. Call it before manifests of the folder are read."""
    if root in _held or not root.is_dir():
        return
    with suppress(
        OSError
    ):  # not ours to write, or a file system without locks: then nothing is removed by others like us
        descriptor = os.open(root / "in-use", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _share(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        _held[root] = descriptor
        if len(_held) > _MOST_HELD:
            os.close(_held.pop(next(iter(_held))))


def tidy(root: Path) -> None:
    """Remove old files, at most once a day. Call it after all that this process needs was found or made."""
    descriptor = _held.get(root)
    if descriptor is None or _age_s(root / "tidied") < _DAY_S:
        return
    with suppress(OSError):
        _tidy_if_alone(root, descriptor)
        _share(descriptor)  # the lock may be lost for a moment, but the files in use were noted


def note_use(path: Path) -> None:
    """Note that a cached file is in use: its time is set, at most once a day."""
    if _age_s(path) > _DAY_S:
        with suppress(OSError):  # a folder that is only read
            os.utime(path)


def _share(descriptor: int) -> None:
    """Raises OSError where another process removes for longer than is waited, or the file system has no locks."""
    end = time.monotonic() + _SHARE_DEADLINE_S
    while not try_lock(descriptor, shared=True):
        if time.monotonic() > end:
            raise BlockingIOError("another process has been removing files for a minute")
        time.sleep(0.05)


def _tidy_if_alone(root: Path, descriptor: int) -> None:
    try:
        if not try_lock(descriptor):  # somebody uses it: another time
            return
        with locked(root, _LOCK_DEADLINE_S), writable(root):
            (root / "tidied").touch()
            removed = sum(_remove(path) for path in _unused(root))
    except (ConfigError, DeadlineError) as error:
        logger.debug("%s is not tidied: %s", root, error)
        return
    if removed:
        logger.warning("%s: removed %d files that no run had used for %d days", root, removed, UNUSED_S // _DAY_S)


def _unused(root: Path) -> Iterator[Path]:
    """Files and folders to remove."""
    needed: set[str] = set()  # parts of the entries that stay: of changed data only what changed is scanned again
    for entry in _in(root / "entries"):
        contents = [path for path in _in(entry) if path.is_dir() and not _is_temporary(path)]
        old = [path for path in contents if _age_s(path / "manifest.json") > UNUSED_S]
        if len(old) == len(contents) and _age_s(entry / "state.json") > UNUSED_S:
            yield entry
            continue
        needed |= _parts_of(entry / "state.json")
        yield from old
        yield from (path for path in _in(entry) if _is_temporary(path) and _age_s(path) > _DAY_S)
    for folder in (root / "codecs", *_in(root / "parts")):
        for path in _in(folder):
            limit_s = _DAY_S if _is_temporary(path) else UNUSED_S
            if path.stem not in needed and _age_s(path) > limit_s:
                yield path


def _parts_of(state: Path) -> set[str]:
    try:
        return set(orjson.loads(state.read_bytes())["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _remove(path: Path) -> int:
    """Remove a file or a folder; returns the number of files."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return 1
    count = sum(1 for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path)
    return count


def _in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"


def _age_s(path: Path) -> float:
    """Seconds since the file was written or used; infinite if it does not exist."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
