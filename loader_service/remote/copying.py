"""Copies one remote file. The copy appears whole, and the index counts its bytes before the first one is written."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loader_service.remote.eviction import Copies, make_room
from loader_service.remote.filesystem import BLOCK_BYTES, FileInfo, RemoteFiles
from loader_service.remote.index import NO_VERSION, Index
from loader_service.remote.url import Place
from stoker_proto.errors import FetchError


@dataclass(frozen=True, slots=True)
class Original:
    """A file behind a URL, as its host describes it now."""

    files: RemoteFiles
    place: Place
    info: FileInfo
    is_shard: bool
    """Manifests were made of this version: all of the copy must be of it."""


def copy_file(original: Original, key: str, part: Path, copies: Copies) -> None:
    """Fill the part, whose lock is held, and give it the name `key` below the folder of copies. Raises FetchError.

    From the first byte until the rename, the index has no version for the copy. So after any interruption an older copy is never
    taken for this one.
    """
    files, place, info = original.files, original.place, original.info
    folder, index = copies.folder, copies.index
    target = folder / key
    index.reserve(key, info.size, NO_VERSION)
    is_done = False
    try:
        make_room(copies, key, info.size)
        with part.open("r+b") as file:
            file.truncate()
            files.download(place, info, file.fileno(), part)
            os.fsync(file.fileno())
        # A file that one request returns is of one version.
        if (original.is_shard or info.size > BLOCK_BYTES) and files.info(place).version != info.version:
            raise FetchError(f"{place.url()}: it changed while it was fetched")
        for _ in range(100):  # another process may be removing the emptied folder
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                part.rename(target)
                is_done = True
                break
        if is_done:
            index.reserve(key, info.size, info.version)
    except FileNotFoundError as error:
        raise FetchError(f"{place.url()}: it was removed while it was fetched") from error
    except OSError as error:
        raise FetchError(
            f"{place.url()}: no copy of it can be written to {folder} ({error.strerror or error}): name another folder "
            "with --cache-dir or data.cache_dir"
        ) from error
    finally:
        _count_what_is_left(target, key, index, is_done)


def _count_what_is_left(target: Path, key: str, index: Index, is_done: bool) -> None:
    """Correct the index: a failed download leaves an older copy, and another process may have removed the new one."""
    try:
        size = target.stat().st_size
    except FileNotFoundError:
        index.forget(key)
    else:
        if not is_done:
            index.reserve(key, size, NO_VERSION)
