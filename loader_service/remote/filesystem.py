"""One host's files through fsspec: sizes and versions, listings, content; with retries and a deadline."""

from __future__ import annotations

import importlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loader_service.remote.timed_call import call_within
from loader_service.remote.url import Place
from stoker_proto.errors import ConfigError, FetchError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
"""Bytes of one request, and so the most that is fetched again after a broken connection."""
LISTING_DEADLINE_S = 1800.0
_SLOWEST = 1 << 20  # bytes per second, where a file can only be had whole
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_VERSION_FIELDS = (
    *("ETag", "etag", "md5Hash", "md5", "Content-MD5", "checksum", "sha256", "blob_id", "generation"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "modified", "updated", "created"),
)
"""Fields of fsspec's file information that change with the content, the most reliable first."""
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "'stoker[remote]'"),
    "hf": "huggingface_hub",
}
_GONE = (404, 410)
_WORTH_A_RETRY = (408, 425, 429)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What the host says of a file."""

    size: int
    version: str
    """A different version means different content."""
    is_folder: bool = False


def same_version(one: str, other: str) -> bool:
    """Whether two versions may be of the same content. A listing may hold fewer fields than a request for one file.

    >>> same_version("10 ETag=a", "10 ETag=b"), same_version("10 ETag=a", "10 mtime=1")
    (False, True)
    """
    (size, _, tag), (other_size, _, other_tag) = one.partition(" "), other.partition(" ")
    is_comparable = tag.partition("=")[0] == other_tag.partition("=")[0]
    return one == other if is_comparable else size == other_size


class RemoteFiles:
    """The files of one host. Used by several threads at once. Raises FileNotFoundError, FetchError, ConfigError."""

    def __init__(self, protocol: str, options: dict[str, Any], deadline_s: float) -> None:
        _import(protocol)  # before the clock runs: it may take seconds on a busy host, and says nothing of the storage
        try:
            self._fs = call_within(deadline_s, partial(_open, protocol, options))  # some log in here
        except TimeoutError as error:
            raise FetchError(
                f"{protocol}:// in the data paths: no connection in {deadline_s:g} s: is it reachable from this host? For slow "
                "storage raise data.remote.deadline_s"
            ) from error
        self._is_async = bool(getattr(self._fs, "async_impl", False))
        self._deadline_s = deadline_s

    def info(self, place: Place) -> FileInfo:
        """Size and version of a file, or that it is a folder."""
        found = self._retrying(place.url(), lambda left_s: self._call("info", left_s, self._path(place.url())))
        return _info_of(found, place.url())

    def glob(self, place: Place, pattern: str) -> dict[str, FileInfo]:
        """Key of each match -> its information. pattern: a key with wildcards."""
        url = place.url(pattern)

        def call(_: float) -> Any:
            return self._call("glob", LISTING_DEADLINE_S, self._path(url), detail=True)

        prefix = self._path(place.url("")).rstrip("/") + "/"
        found = self._retrying(url, call)
        return {path.removeprefix(prefix): _info_of(info, path) for path, info in found.items()}

    def download(self, place: Place, info: FileInfo, descriptor: int, path: Path) -> None:
        """Write the content to an open, empty file. A retry fetches only what is missing."""
        url, offset = place.url(), 0
        while offset < info.size:
            stop = min(offset + BLOCK_BYTES, info.size)
            data = self._retrying(url, partial(self._block, url, info.size, offset, stop))
            if data is None:  # the server does not support ranges
                self._retrying(url, partial(self._whole, url, info.size, path))
                return
            if len(data) == info.size:
                offset = 0
            offset += _write(descriptor, data, offset)

    def _block(self, url: str, size: int, start: int, stop: int, left_s: float) -> bytes | None:
        place = {} if stop - start == size else {"start": start, "end": stop}
        data: bytes = self._call("cat_file", left_s, self._path(url), **place)
        if place and len(data) == size:
            return (
                None if self._is_async else data
            )  # all bytes are here. Async calls are abandoned at a timeout, and must not write to the file
        if len(data) != stop - start:
            raise EOFError(f"{len(data)} bytes came instead of {stop - start}")
        return data

    def _whole(self, url: str, size: int, path: Path, left_s: float) -> None:
        self._call("get_file", left_s + size / _SLOWEST, self._path(url), str(path))
        if path.stat().st_size != size:
            raise EOFError(f"{path.stat().st_size} bytes came instead of {size}")

    def _path(self, url: str) -> str:
        path: str = self._fs._strip_protocol(url)
        return path

    def _call(self, name: str, timeout_s: float, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the file system; raises TimeoutError."""
        if not self._is_async:
            return call_within(max(timeout_s, 1.0), partial(getattr(self._fs, name), *arguments, **keywords))
        sync = importlib.import_module("fsspec.asyn").sync
        return sync(self._fs.loop, getattr(self._fs, f"_{name}"), *arguments, timeout=max(timeout_s, 1.0), **keywords)

    def _retrying(self, url: str, call: Callable[[float], Result]) -> Result:
        """The result of `call(seconds left)`, retried until the deadline unless the error is final."""
        started, pause_s = time.monotonic(), _FIRST_PAUSE_S
        for attempt in _numbers():
            left_s = started + self._deadline_s - time.monotonic()
            try:
                return call(left_s)
            except (FileNotFoundError, ConfigError, FetchError) as error:
                failure: Exception = error
                if not isinstance(error, FileNotFoundError):
                    raise
            except Exception as error:  # noqa: BLE001 - every file system's library has errors of its own
                failure = error
            cause, status = _cause(failure)
            if isinstance(cause, FileNotFoundError) or status in _GONE:
                raise FileNotFoundError(url) from failure
            reason = _in_words(cause, status)
            if isinstance(cause, PermissionError | ImportError | NotImplementedError) or _is_final(status):
                raise FetchError(
                    f"{url}: {reason}: check the URL and the credentials in the environment of this process"
                ) from failure
            left_s = started + self._deadline_s - time.monotonic() - pause_s
            if left_s <= 0:
                raise FetchError(
                    f"{url}: {reason} ({attempt} attempts in {self._deadline_s:g} s): is it reachable from this host? For slow "
                    "storage raise data.remote.deadline_s"
                ) from failure
            logger.info("%s: %s; trying again in %.1f s", url, reason, pause_s)
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # loaders that failed together must not retry together
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise FetchError(f"{url}: not fetched")


@contextmanager
def missing_package(protocol: str) -> Iterator[None]:
    """An ImportError in the block becomes a ConfigError that says what to install."""
    try:
        yield
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        install = f"pip install {package}" if package else "install the package of its fsspec file system"
        raise ConfigError(f"{protocol}:// in the data paths: {' '.join(str(error).split())}: {install}") from error


def _import(protocol: str) -> None:
    """Import the protocol's file system. Raises ConfigError."""
    try:
        fsspec = importlib.import_module("fsspec")
    except ImportError as error:
        raise ConfigError(
            f"{protocol}:// in the data paths needs fsspec ({error}): pip install 'stoker[remote]'"
        ) from error
    with missing_package(protocol):
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError as error:
            raise ConfigError(
                f"{protocol}:// in the data paths: fsspec knows no such protocol; correct the URL, or install the package that "
                "brings it"
            ) from error


def _open(protocol: str, options: dict[str, Any]) -> Any:
    fsspec = importlib.import_module("fsspec")
    with missing_package(protocol):
        try:
            # Listings are not cached, so that files of other processes are seen.
            return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **options)
        except ImportError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{protocol}:// in the data paths: its file system cannot be opened ({type(error).__name__}: {reason}): check "
                f"data.remote.storage_options.{protocol} and the credentials in the environment"
            ) from error


def _info_of(found: dict[str, Any], url: str) -> FileInfo:
    if found.get("type") == "directory":
        return FileInfo(0, "", is_folder=True)
    size = found.get("size")
    if size is None:
        raise FetchError(
            f"{url}: the server does not say how long it is: let it send Content-Length, or copy the file here"
        )
    name = next((name for name in _VERSION_FIELDS if found.get(name)), None)
    tag = found[name] if name is not None else ""
    tag = tag.timestamp() if isinstance(tag, datetime) else tag  # some say it both ways
    return FileInfo(int(size), f"{int(size)} {name}={tag}" if name is not None else f"{int(size)}")


def _write(descriptor: int, data: bytes, offset: int) -> int:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done


def _cause(error: BaseException) -> tuple[BaseException, int | None]:
    """The error below fsspec's own, and its HTTP status. fsspec raises FileNotFoundError for every failed HTTP request."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return error, status if isinstance(status, int) else None


def _is_final(status: int | None) -> bool:
    return status is not None and 400 <= status < 500 and status not in _WORTH_A_RETRY


def _in_words(error: BaseException, status: int | None) -> str:
    if status is not None:
        return f"HTTP status {status} {getattr(error, 'message', '')}".strip()
    if isinstance(error, TimeoutError):
        return "no answer in time"
    words = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _numbers() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number
