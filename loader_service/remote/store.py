"""Copies of remote files on this host: fetched on demand, kept within a size limit, never removed while they are read.

    {cache}/remote/index.sqlite                     what is here (`index`)
    {cache}/remote/s3-robots-5d0f3a61/bridge/...    copies, by the paths of their originals (`url`)
    {cache}/remote/.parts/3f09....part              a running download, locked by its process

A copy appears whole, by a rename, and is never written again. A reader holds a shared lock on it, and only copies without a lock
are removed. Locks end with their processes, so a killed process leaves none behind.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loader_service.cache_folder import writable
from loader_service.remote.copying import Original, copy_file
from loader_service.remote.eviction import Copies, remove_copy
from loader_service.remote.filesystem import FileInfo, RemoteFiles, same_version
from loader_service.remote.index import Index
from loader_service.remote.partial_file import locked_part, remove_left_parts
from loader_service.remote.pins import Pins, pin
from loader_service.remote.url import Place, parse_url
from stoker_proto.config.remote import RemoteConfig
from stoker_proto.errors import ConfigError, DataError, FetchError

logger = logging.getLogger(__name__)

_TOUCH_S = 5.0
_POLL_S = 0.02


class RemoteStore:
    """The remote files of one config. Shared by all datasets and threads of a process; processes share its folder."""

    def __init__(self, folder: Path, config: RemoteConfig) -> None:
        """folder: `{cache}/remote`, without links. Touches neither disk nor network."""
        self.folder, self._config = folder, config
        self._places: dict[str, Place] = {}  # folder of a host -> any URL of it
        self._roots: dict[str, bool] = {}  # key -> whether files beside it may be fetched too
        self._files: dict[str, RemoteFiles] = {}
        self._shards: dict[str, str] = {}  # key -> the version that this run's manifests were made of
        self._seen: dict[
            str, tuple[int, int]
        ] = {}  # key of a shard -> inode and time of a copy known to be of that version
        self._index: Index | None = None
        self._lock = threading.Lock()
        self._downloads = threading.BoundedSemaphore(self._config.concurrency)
        self.pins = Pins()
        self._used: dict[str, float] = {}
        self._touched = time.monotonic()

    @property
    def index(self) -> Index:
        """The index of the copies. Raises ConfigError if the folder cannot be used."""
        with self._lock:
            if self._index is None:
                with writable(self.folder):
                    (self.folder / ".parts").mkdir(parents=True, exist_ok=True)
                remove_left_parts(self.folder / ".parts")
                self._index = Index(self.folder)
            return self._index

    @property
    def _copies(self) -> Copies:
        return Copies(self.folder, self.index, self._config)

    def cover(self, urls: Iterable[str]) -> None:
        """Allow fetching what lies in these entries of the data paths, or beside those that are files. Raises ConfigError."""
        for url in urls:
            place = parse_url(url)
            self._places[place.folder_name(self._options(place))] = place
            self._roots[self.key_of(place, place.folder_key)] = place.folder_key == place.key

    def key_of(self, place: Place, key: str | None = None) -> str:
        """Path of a copy relative to `folder`. key: default: the place's own."""
        return f"{place.folder_name(self._options(place))}/{place.key if key is None else key}".rstrip("/")

    def path_of(self, url: str) -> Path:
        """Path of the copy of a URL's file or folder."""
        place = parse_url(url)
        return self.folder / self.key_of(place)

    def holds(self, path: Path) -> bool:
        """Whether the path lies in the folder of copies."""
        return path.is_relative_to(self.folder)

    def folder_above(self, shard: Path, name: str) -> Path:
        """The nearest folder above the shard in which loader-prepare found a file of this name. Raises DataError."""
        for folder in shard.parents:
            if folder == self.folder:
                break
            if self._expected((folder / name).relative_to(self.folder).as_posix()) is not None:
                return folder
        raise DataError(f"no {name} in any folder above it: run loader-prepare again", file=str(shard))

    def place_of(self, path: Path) -> Place:
        """The URL of a copy. Raises DataError for a path that no entry of the data paths covers."""
        return self._place(path.relative_to(self.folder).as_posix(), str(path))

    def recheck(self, error: DataError) -> DataError:
        """Have a file that an error calls bad compared with its original at the next use, however new the copy is (shards have a
        known version). Returns the same error with the URL in place of the copy's path."""
        path = Path(error.file)
        if error.file and self.holds(path) and self._expected(path.relative_to(self.folder).as_posix()) is None:
            with suppress(OSError):
                os.utime(path, (0, 0))  # older than any `recheck_hours`
        return type(error)(error.reason, file=self._url(error.file), record=self._url(error.record), field=error.field)

    def _url(self, path: str) -> str:
        """The URL of a copy; any other text is returned as it is."""
        return self.place_of(Path(path)).url() if path.startswith(f"{self.folder}/") else path

    def files(self, place: Place) -> RemoteFiles:
        """The host's file system. Raises ConfigError if it cannot be opened."""
        name = place.folder_name(self._options(place))
        with self._lock:
            if name not in self._files:
                self._files[name] = RemoteFiles(place.protocol, self._options(place), self._config.deadline_s)
            return self._files[name]

    def preload(self) -> None:
        """Open the hosts' file systems, which imports their libraries."""
        for place in list(self._places.values()):
            try:
                self.files(place)
            except (ConfigError, FetchError) as error:  # not needed if all copies are here; else the fetch raises it
                logger.info("%s", error)

    def local(self, path: str) -> str:
        """Fetch the copy with this path, if it is missing or out of date. Returns the path; other paths are returned as they are.

        Raises DataError for a file that does not exist or lies outside the data paths; FetchError for one that cannot be fetched
        now, and for a shard that changed."""
        prefix = f"{self.folder}/"
        if not path.startswith(prefix) or path in self.pins:
            return path
        key = path[len(prefix) :]
        place = self._place(key, path)
        pinned = pin(path)
        if pinned is not None and self._is_due(pinned, key):
            os.close(pinned)
            self._fetch(place, key, path)
            pinned = pin(path)
        while pinned is None or not self._is_as_scanned(pinned, key):  # removed or replaced again before it was pinned
            if pinned is not None:
                os.close(pinned)
            self._fetch(place, key, path)
            pinned = pin(path)
        self.pins.keep(path, pinned)
        self._note_use(key)
        return path

    def known_shards(self, infos: Sequence[tuple[Place, FileInfo]]) -> None:
        """Store what loader-prepare found. Copies of other versions are removed, now or when no process reads them any more."""
        versions = {self.key_of(place): info.version for place, info in infos}
        self.index.set_shards(versions)
        self.expect(versions)
        for key, version in versions.items():
            before = self.index.version(key)
            if before is not None and not same_version(before, version):
                remove_copy(self._copies, key)

    @property
    def shards(self) -> dict[str, str]:
        """Key -> version of all shards that this process knows. Its workers must `expect` them."""
        return dict(self._shards)

    def expect(self, versions: Mapping[str, str]) -> None:
        """Set the versions that this run's manifests were made of. Another process may scan newer ones into the same folder
        meanwhile."""
        with self._lock:
            self._shards.update(versions)
            for key in versions:
                self._seen.pop(key, None)

    def _fetch(self, place: Place, key: str, path: str) -> None:
        """Fetch the copy, unless it is up to date. The thread gives its slot to another one meanwhile."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        index = self.index
        with (
            self.pins.waiting(),
            locked_part(self.folder / ".parts" / f"{digest}.part", self._config.deadline_s) as part,
        ):
            expected = self._expected(key)
            there = Path(path).exists()
            if there and (not self._is_old(path) if expected is None else self._is_of(key, expected)):
                return  # another process fetched it
            with self._downloads:
                try:
                    info = self.files(place).info(place)
                except FileNotFoundError as error:
                    raise DataError(
                        "there is no such file: copy it there, or correct the row that names it", file=place.url()
                    ) from error
                if info.is_folder:
                    raise DataError("a folder: a file is expected", file=place.url())
                if expected is not None and not same_version(info.version, expected):
                    raise FetchError(  # no DataError: the data may be good, so policy `skip` must not skip it
                        f"{place.url()}: it changed since it was scanned: start the loader again, which scans it anew; a run "
                        "that began with the old content refuses the new one"
                    )
                if there and index.version(key) == info.version:
                    with suppress(FileNotFoundError):
                        os.utime(path)
                    return
                if there and expected is not None:
                    self._remove_other_version(place, key)
                original = Original(self.files(place), place, info, is_shard=expected is not None)
                copy_file(original, key, part, self._copies)
                logger.debug("fetched %s, %d bytes", place.url(), info.size)

    def _expected(self, key: str) -> str | None:
        """The version that a copy must have; None for files that are no shards."""
        return self._shards.get(key) or self.index.shard_version(key)

    def _is_of(self, key: str, expected: str) -> bool:
        version = self.index.version(key)
        return version is not None and same_version(version, expected)

    def _is_as_scanned(self, descriptor: int, key: str) -> bool:
        """Whether the pinned copy is of the version in the manifests. Always true for files that are no shards."""
        expected = self._shards.get(key)
        if expected is None:
            return True
        status = os.fstat(descriptor)
        seen = status.st_ino, status.st_mtime_ns
        if self._seen.get(key) != seen:
            if not self._is_of(key, expected):
                return False
            self._seen[key] = seen
        return True

    def _remove_other_version(self, place: Place, key: str) -> None:
        """Remove a copy of another version, after waiting for the processes that read it. Raises FetchError."""
        end = time.monotonic() + self._config.deadline_s
        while not remove_copy(self._copies, key):
            if time.monotonic() > end:
                raise FetchError(
                    f"{place.url()}: a copy of an older version has been read by another process for "
                    f"{self._config.deadline_s:g} s: end the loaders that still use that, or name another --cache-dir"
                )
            time.sleep(_POLL_S)

    def _is_due(self, descriptor: int, key: str) -> bool:
        """Whether the copy must be compared with its original. Shards are compared when they are scanned."""
        age_s = time.time() - os.fstat(descriptor).st_mtime
        return age_s > self._recheck_s() and self._expected(key) is None

    def _is_old(self, path: str) -> bool:
        with suppress(FileNotFoundError):
            return time.time() - Path(path).stat().st_mtime > self._recheck_s()
        return False

    def _recheck_s(self) -> float:
        return 3600 * self._config.recheck_hours

    def _note_use(self, key: str) -> None:
        """Uses are written to the index every few seconds, together."""
        now = time.monotonic()
        with self._lock:
            self._used[key] = time.time()
            if now - self._touched < _TOUCH_S:
                return
            used, self._used, self._touched = self._used, {}, now
        self.index.touch(used)

    def _place(self, key: str, path: str) -> Place:
        """The URL of a key. Raises DataError for a key that no entry of the data paths covers."""
        host, _, rest = key.partition("/")
        known = self._places.get(host)
        if os.path.normpath(path) == path and known is not None and rest and self._is_covered(key):
            return Place(known.protocol, known.host, rest)
        raise DataError(
            "it lies outside the URLs of the data paths, and nothing else is fetched: correct the row that names it, or set "
            "data.data_root to the URL of a folder that holds both",
            file=path,
        )

    def _is_covered(self, key: str) -> bool:
        for root, may_be_file in list(self._roots.items()):
            if key == root or key.startswith(f"{root.rstrip('/')}/"):
                return True
            beside = root.rpartition("/")[0]
            if may_be_file and key.startswith(f"{beside}/") and self._expected(root) is not None:
                return True
        return False

    def _options(self, place: Place) -> dict[str, Any]:
        return dict(self._config.storage_options.get(place.protocol, {}))
