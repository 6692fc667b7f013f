"""The file that a copy is written to before it has its name, and the lock that lets one of several processes do it."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stoker_proto.errors import ConfigError, FetchError
from stoker_proto.host_trouble import check_host

logger = logging.getLogger(__name__)

_POLL_S = 0.02


@contextmanager
def locked_part(path: Path, deadline_s: float) -> Iterator[Path]:
    """Make the file and hold its lock; removed at the end, unless renamed. Another holder may take as long as it writes."""
    descriptor = _lock(path, deadline_s)
    try:
        yield path
    finally:
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                path.unlink()
        os.close(descriptor)


def remove_left_parts(folder: Path) -> None:
    """Those of processes that were killed."""
    for path in folder.glob("*.part"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _lock(path: Path, deadline_s: float) -> int:
    seen, since = -1, time.monotonic()
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            check_host(error, str(path))
            raise ConfigError(
                f"the cache folder {path.parent.parent} cannot be written ({error.strerror}): name another one with --cache-dir "
                "or data.cache_dir"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except BlockingIOError:
            size = os.fstat(descriptor).st_size
            if size != seen:
                seen, since = size, time.monotonic()
            if time.monotonic() - since > 2 * deadline_s:  # its own deadline has ended it long before, if it lives
                os.close(descriptor)
                raise FetchError(
                    f"{path}: another process has been fetching this file without progress for {2 * deadline_s:g} s: is it "
                    "stopped?"
                ) from None
            time.sleep(_POLL_S)
        except (
            OSError
        ) as error:  # a file system without locks: the same file may be fetched twice, each into a place of its own
            os.close(descriptor)
            raise ConfigError(
                f"the cache folder {path.parent.parent} cannot be locked ({error.strerror}): name one on a local disk with "
                "--cache-dir or data.cache_dir"
            ) from error
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still has the name: the holder before may have given it another one, or removed it."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
