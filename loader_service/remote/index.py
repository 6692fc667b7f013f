"""The index of the cache of remote files: an SQLite file that all processes of a host share.

    files    key, size, version, used, fetched     one row per copy, written before the copy, so that every copy is counted
    shards   key, version                          as loader-prepare found them: a copy of a shard must be of this version
    total    bytes                                 of all files, kept by triggers

Keys are paths below `{cache}/remote`. The file can be deleted at any time; it is built again from the copies.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from loader_service.cache_folder import writable
from stoker_proto.errors import ConfigError, FetchError
from stoker_proto.host.files import try_lock

logger = logging.getLogger(__name__)

FILE = "index.sqlite"
NO_VERSION = ""
"""Version of a copy of unknown origin: it matches no original, so the file is fetched again when it is compared."""
_BUSY_S = 60.0
_POLL_S = 0.01
_LOCK = "index.lock"
_VERSION = 1
"""Version of the tables. It is set after older copies were counted."""
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS files (key TEXT PRIMARY KEY, size INTEGER, version TEXT, used REAL, fetched REAL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS files_by_use ON files (used)",
    "CREATE TABLE IF NOT EXISTS shards (key TEXT PRIMARY KEY, version TEXT) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS total (bytes INTEGER)",
    "INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM total)",
    "CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON files BEGIN UPDATE total SET bytes = bytes + new.size; END",
    "CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON files BEGIN UPDATE total SET bytes = bytes - old.size; END",
)


class Copy(NamedTuple):
    """A row of `files`."""

    key: str
    size: int
    used: float
    fetched: float


class Index:
    """Used by several threads and processes at once. Raises FetchError where the file cannot be used."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()
        with self._opening():
            try:
                self._connection = self._open(folder)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise ConfigError(str(self._unusable(error))) from error
                logger.warning("%s is damaged (%s): it is made anew", self._path, error)
                for suffix in ("", "-wal", "-shm"):
                    self._path.with_name(FILE + suffix).unlink(missing_ok=True)
                self._connection = self._open(folder)

    def reserve(self, key: str, size: int, version: str) -> None:
        """Count a copy that is about to be written."""
        now = time.time()
        with self._changing() as connection:
            connection.execute("DELETE FROM files WHERE key = ?", (key,))  # not REPLACE: that wakes no trigger
            connection.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?)", (key, size, version, now, now))

    def forget(self, key: str) -> None:
        """The copy is gone."""
        with self._changing() as connection:
            connection.execute("DELETE FROM files WHERE key = ?", (key,))

    def touch(self, used: Mapping[str, float]) -> None:
        """Note when copies were last used, in seconds since 1970."""
        with self._changing() as connection:
            rows = [(at, key) for key, at in used.items()]
            connection.executemany("UPDATE files SET used = max(used, ?) WHERE key = ?", rows)

    def oldest(self, count: int) -> list[Copy]:
        """The copies that were used longest ago, the oldest first."""
        rows = self._ask("SELECT key, size, used, fetched FROM files ORDER BY used LIMIT ?", count)
        return [Copy(*row) for row in rows]

    def total_bytes(self) -> int:
        """Bytes of all copies."""
        return int(self._ask("SELECT bytes FROM total")[0][0])

    def version(self, key: str) -> str | None:
        """Version of a copy; None if there is no copy."""
        rows = self._ask("SELECT version FROM files WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def set_shards(self, versions: Mapping[str, str]) -> None:
        """Store the versions of shards that loader-prepare found."""
        with self._changing() as connection:
            connection.executemany("INSERT OR REPLACE INTO shards VALUES (?, ?)", list(versions.items()))

    def shard_version(self, key: str) -> str | None:
        """Version of a shard as loader-prepare found it; None for other files."""
        rows = self._ask("SELECT version FROM shards WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def _ask(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock, closing(self._connection.execute(query, values)) as cursor:
                rows: list[tuple[Any, ...]] = cursor.fetchall()
                return rows
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock, self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """One process at a time: SQLite does not wait for its lock while a new file is switched to WAL."""
        with writable(self._path.parent):
            file = self._path.with_name(_LOCK).open("wb")
        with file:
            end = time.monotonic() + _BUSY_S
            while not self._try_lock(file.fileno()):
                if time.monotonic() > end:
                    raise FetchError(
                        f"{self._path}: another process has been opening it for {_BUSY_S:g} s: is it stopped?"
                    )
                time.sleep(_POLL_S)
            yield

    def _try_lock(self, descriptor: int) -> bool:
        try:
            return try_lock(descriptor)
        except OSError as error:
            raise ConfigError(
                f"{self._path.parent} cannot be locked ({error.strerror}): name a folder on a local disk with --cache-dir or "
                "data.cache_dir"
            ) from error

    def _open(self, folder: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = OFF")  # after a power cut it may be damaged, and is built again
            if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:  # new or unfinished
                connection.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?)", _copies(folder))
                connection.execute(f"PRAGMA user_version = {_VERSION}")
                connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    def _unusable(self, error: sqlite3.Error) -> FetchError:
        return FetchError(
            f"{self._path}: the index of the cache of remote files cannot be used ({error}): name a folder on a local disk with "
            "--cache-dir or data.cache_dir"
        )


def _copies(folder: Path) -> Iterator[tuple[str, int, str, float, float]]:
    """Rows for copies that were there before the index. Their versions are unknown: `NO_VERSION`."""
    now = time.time()
    for host in folder.iterdir():
        if host.name.startswith("."):
            continue
        for place, folders, names in os.walk(host):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(place) / name
                with suppress(FileNotFoundError):  # removed by hand meanwhile
                    os.utime(path, (0, 0))  # so that it is compared at its next use
                    yield path.relative_to(folder).as_posix(), path.stat().st_size, NO_VERSION, now, now
