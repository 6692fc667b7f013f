"""The cache folder: where it lies and how it is locked.

    .stoker/                      beside the data, or {cache_dir}/{folder's name}-{hash of its path}/
      lock                        held while something is scanned
      parts/3f/3f09....npz        what the scan of one part of a shard found, named by the part's content
      entries/{key}/state.json    the shards as they were seen last; names the folder of columns
      entries/{key}/{content}/    manifest.json, *.npy columns, actions.npz: one manifest, never changed
      codecs/{key}.json           fitted action codecs
      in-use, tidied              see `prepare.cleanup`: files that no run has used for a month are removed

Everything here can be computed again: deleting the folder costs a scan.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.shards import CACHE_FOLDER
from stoker_proto.errors import ConfigError, DeadlineError
from stoker_proto.host.files import open_lock_file, try_lock, whole_file, write_whole
from stoker_proto.host.trouble import check_host

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
    """An OSError in the block becomes a ConfigError that names the folder and the way out, or a HostError."""
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
    """Create the folder and hold its lock. Of two loaders that start together, one scans; the other waits and uses the result."""
    with writable(root):
        root.mkdir(parents=True, exist_ok=True)
        if not (root / ".gitignore").exists():
            write_whole(root / ".gitignore", b"*\n")
        descriptor = open_lock_file(root / "lock")
    try:
        _wait_for_lock(descriptor, root, deadline_s)
        yield
    finally:
        os.close(descriptor)  # frees the lock, as the end of the process would


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an NPZ of the arrays; a reader sees all of it or nothing."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _wait_for_lock(descriptor: int, root: Path, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    told = False
    while not _has_lock(descriptor, root):
        if time.monotonic() >= end:
            raise DeadlineError(
                f"{root / 'lock'}: another process has been scanning this data for {deadline_s:g} s; wait for it, or name "
                "another cache folder with --cache-dir"
            )
        if not told:
            logger.info("another process is scanning the data of %s: waiting for it", root)
            told = True
        time.sleep(_POLL_S)


def _has_lock(descriptor: int, root: Path) -> bool:
    """True also on a file system without locks: files are replaced whole there, so at worst work is done twice."""
    try:
        return try_lock(descriptor)
    except OSError as error:
        logger.warning("%s cannot be locked (%s): two loaders may scan the same data at once", root, error.strerror)
        return True
