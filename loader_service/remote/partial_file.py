"""The temporary file of a download (a part), and its lock: one of several processes downloads a file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stoker_proto.errors import ConfigError, FetchError
from stoker_proto.host.files import open_lock_file, try_lock
from stoker_proto.host.trouble import check_host

_POLL_S = 0.02


@contextmanager
def locked_part(path: Path, deadline_s: float) -> Iterator[Path]:
    """Create the part and hold its lock; at the end it is removed, unless it was renamed. Waits while another process makes
    progress.

    Raises ConfigError, FetchError."""
    descriptor = _lock(path, deadline_s)
    try:
        yield path
    finally:
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                path.unlink()
        os.close(descriptor)


def remove_left_parts(folder: Path) -> None:
    """Remove the parts of processes that were killed."""
    for path in folder.glob("*.part"):
        with suppress(FileNotFoundError), path.open("rb") as file:
            if try_lock(file.fileno()):
                path.unlink()


def _lock(path: Path, deadline_s: float) -> int:
    seen, since = -1, time.monotonic()
    while True:
        try:
            descriptor = open_lock_file(path)
        except OSError as error:
            check_host(error, str(path))
            raise ConfigError(
                f"the cache folder {path.parent.parent} cannot be written ({error.strerror}): name another one with --cache-dir "
                "or data.cache_dir"
            ) from error
        try:
            is_locked = try_lock(descriptor)
        except OSError as error:  # without locks two processes would write the same part
            os.close(descriptor)
            raise ConfigError(
                f"the cache folder {path.parent.parent} cannot be locked ({error.strerror}): name one on a local disk with "
                "--cache-dir or data.cache_dir"
            ) from error
        if is_locked and _is_at(path, descriptor):
            return descriptor
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        if is_locked:
            continue
        if size != seen:
            seen, since = size, time.monotonic()
        if time.monotonic() - since > 2 * deadline_s:  # its own deadline has ended it long before, if it lives
            raise FetchError(
                f"{path}: another process has been fetching this file without progress for {2 * deadline_s:g} s: is it stopped?"
            )
        time.sleep(_POLL_S)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still has this name: the process before may have renamed or removed it."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
