"""The cache folder: where it lies, how it is locked, how files appear in it whole or not at all.

    .stoker/                      beside the data, or {cache_dir}/{folder's name}-{hash of its path}/
      lock                        held while something is scanned
      parts/3f/3f09....npz        what the scan of one part of a shard found, named by the part's content
      entries/{key}/state.json    the shards as they were seen last; names the folder of columns
      entries/{key}/{content}/    manifest.json, *.npy columns, actions.npz: one manifest, never changed
      codecs/{key}.json           fitted action codecs
      in-use, tidied              see `tidy`: what no run has used for a month is removed

Everything here can be made anew: deleting the folder costs a scan.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.shards import CACHE_FOLDER
from stoker_proto.errors import ConfigError, DeadlineError
from stoker_proto.host_trouble import check_host

logger = logging.getLogger(__name__)

LOCK_DEADLINE_S = 3600.0
"""How long a second loader waits for the first one's scan."""
_POLL_S = 0.05


def cache_root(base: Path, cache_dir: Path | None) -> Path:
    """The cache folder of the data in `base`."""
    if cache_dir is None:
        return base / CACHE_FOLDER
    place = hashlib.blake2b(os.fsencode(base), digest_size=6).hexdigest()
    return cache_dir.expanduser().resolve() / f"{base.name}-{place}"


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Turns what the operating system says about a folder that cannot be written into a ConfigError with the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # another folder helps against a full disk
            check_host(error, str(root))
        raise ConfigError(
            f"the cache folder {root} cannot be written ({error.strerror or error}): name another one with --cache-dir or "
            "data.cache_dir"
        ) from error


@contextmanager
def locked(root: Path, deadline_s: float) -> Iterator[None]:
    """Make the folder and hold its lock: of two loaders that start together one scans, the other waits and finds it done."""
    with writable(root):
        root.mkdir(parents=True, exist_ok=True)
        if not (root / ".gitignore").exists():
            write_whole(root / ".gitignore", b"*\n")
        descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _wait_for_lock(descriptor, root, deadline_s)
        yield
    finally:
        os.close(descriptor)  # gives the lock back, as the end of the process would


def write_whole(path: Path, content: bytes) -> None:
    """A reader sees the old file or the whole new one."""
    with _renamed_when_written(path) as temporary:
        temporary.write_bytes(content)


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """An NPZ of the arrays, whole or not at all."""
    with _renamed_when_written(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end of the block; what was there before gives way."""
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():  # damaged, or it would not be made anew
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _renamed_when_written(path: Path) -> Iterator[Path]:
    """A file to write in the block; nothing is left of it where that fails, as on a full disk."""
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> Path:
    """Beside it, and nobody else's: processes of several containers that share the folder may have the same number."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _wait_for_lock(descriptor: int, root: Path, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise DeadlineError(
                    f"{root / 'lock'}: another process has been scanning this data for {deadline_s:g} s; wait for it, or "
                    "name another cache folder with --cache-dir"
                ) from None
        except OSError as error:  # a file system without locks: files are replaced whole, so only work is done twice
            logger.warning("%s cannot be locked (%s): two loaders may scan the same data at once", root, error.strerror)
            return
        if not told:
            logger.info("another process is scanning the data of %s: waiting for it", root)
            told = True
        time.sleep(_POLL_S)
