"""Removes copies to make room for new ones: the least recently used first, and never one that a process reads."""

from __future__ import annotations

import logging
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loader_service.remote.index import Copy, Index
from stoker_proto.config.remote import RemoteConfig
from stoker_proto.errors import FetchError
from stoker_proto.host.files import try_lock

logger = logging.getLogger(__name__)

_GB = 10**9
_ROUND = 64
_SHORT_LIFE_S = 600.0
_told: set[str] = set()


@dataclass(frozen=True, slots=True)
class Copies:
    """The copies on this host: their folder, the index of what is in it, and the limits of both."""

    folder: Path
    index: Index
    config: RemoteConfig


def make_room(copies: Copies, key: str, size: int) -> None:
    """Remove copies until a file of `size` bytes, which the index counts already, fits. What is in use stays, even beyond
    `cache_gb`.

    Raises FetchError where the disk has no room."""
    folder, index, config = copies.folder, copies.index, copies.config
    budget, least_free = int(config.cache_gb * _GB), int(config.min_free_gb * _GB)
    busy: set[str] = {key}
    while True:
        free = shutil.disk_usage(folder).free
        if index.total_bytes() <= budget and free >= least_free + size:
            return
        oldest = [copy for copy in index.oldest(_ROUND + len(busy)) if copy.key not in busy]
        if not oldest:
            break
        for copy in oldest:
            if index.total_bytes() <= budget and shutil.disk_usage(folder).free >= least_free + size:
                return
            if remove_copy(copies, copy.key):
                _tell_of_short_life(copies, copy)
            else:
                busy.add(copy.key)
    if shutil.disk_usage(folder).free < least_free + size:
        raise FetchError(
            f"no room in {folder} for a file of {size} bytes: {shutil.disk_usage(folder).free >> 20} MiB are free, and "
            f"data.remote.min_free_gb leaves {config.min_free_gb:g} GB alone: name a folder on another disk with --cache-dir or "
            "data.cache_dir"
        )
    if "busy" not in _told:
        _told.add("busy")
        logger.warning(
            "the %g GB of data.remote.cache_gb do not hold the files that are read at the same time: %d bytes are kept; raise it",
            config.cache_gb,
            index.total_bytes(),
        )


def remove_copy(copies: Copies, key: str) -> bool:
    """Remove one copy. Returns False if a process reads it."""
    folder, index = copies.folder, copies.index
    path = folder / key
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:  # removed by hand, or not there yet: then its process counts it again
        index.forget(key)
        return True
    try:
        if not try_lock(descriptor):
            return False
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    index.forget(key)
    with suppress(OSError):  # its folders that are empty now
        for parent in path.relative_to(folder).parents[:-2]:
            (folder / parent).rmdir()
    return True


def _tell_of_short_life(copies: Copies, copy: Copy) -> None:
    if time.time() - copy.fetched < _SHORT_LIFE_S and "short" not in _told:
        _told.add("short")
        logger.warning(
            "the %g GB of data.remote.cache_gb in %s do not hold what is read within %d minutes: files are fetched again and "
            "again; raise it",
            copies.config.cache_gb,
            copies.folder,
            _SHORT_LIFE_S // 60,
        )
