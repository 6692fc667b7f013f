"""Which errors are trouble of the host, whatever wraps them."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from stoker_proto.errors import ConfigError, DataError, FetchError, HostError
from stoker_proto.host.trouble import check_host, host_error, host_errors


def os_error(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), "/data/a.npz")


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def during(error: Exception, context: BaseException) -> Exception:
    error.__context__ = context
    return error


class FFmpegError(Exception):
    """As PyAV's: an errno, and no OSError."""

    errno = errno.EIO


@pytest.mark.parametrize(
    "name", ["EMFILE", "ENFILE", "EIO", "ESTALE", "ENOMEM", "ETIMEDOUT", "ENOSPC", "EAGAIN", "ENOBUFS", "ENOTCONN"]
)
def test_these_numbers_are_the_hosts(name: str) -> None:
    for error in (
        os_error(name),
        caused(DataError("bad", file="b"), os_error(name)),
        caused(ValueError("x"), os_error(name)),
    ):
        found = host_error(error, "a.npz")
        assert isinstance(found, HostError)
        assert f"trouble of this host ({name}, " in str(found)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (MemoryError(), "ENOMEM"),
        (TimeoutError(), "ETIMEDOUT"),
        (FFmpegError("damaged"), "EIO"),
        (RuntimeError("can't start new thread"), "EAGAIN"),
        (ValueError("Could not open Parquet input source: [errno 24] Too many open files"), "EMFILE"),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), "EMFILE"),
        (during(DataError("bad"), during(KeyError("x"), os_error("ESTALE"))), "ESTALE"),
    ],
)
def test_so_are_these(error: BaseException, name: str) -> None:
    assert f"({name}, " in str(host_error(error))


@pytest.mark.parametrize(
    "error",
    [
        *map(os_error, ["ENOENT", "EACCES", "EISDIR", "ENOTDIR", "ELOOP", "ENAMETOOLONG", "EINVAL"]),
        OSError("image file is truncated"),
        ValueError("Parquet magic bytes not found"),
        RuntimeError("anything"),
        ImportError("No module named x"),
        DataError("a text that quotes [errno 24] Too many open files"),
        caused(DataError("bad"), ValueError("x")),
        caused(ConfigError("no room: name another folder"), os_error("ENOSPC")),
        FetchError("the URL does not answer"),
    ],
)
def test_these_are_not(error: Exception) -> None:
    assert host_error(error) is None
    check_host(error)
    with pytest.raises(type(error)), host_errors("a.npz"):
        raise error


def test_what_was_left_out_on_purpose_is_not_looked_at() -> None:
    error = during(DataError("there is no such file"), os_error("EMFILE"))
    error.__suppress_context__ = True
    assert host_error(error) is None


def test_a_circle_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert host_error(first) is None


def test_it_names_the_file_once_and_crosses_processes() -> None:
    error = host_error(os_error("EMFILE"), "/data/a.npz")
    assert str(pickle.loads(pickle.dumps(error))) == (  # noqa: S301 - made here
        "[Errno 24] Too many open files: '/data/a.npz': trouble of this host (EMFILE, Too many open files), no fault of the data"
    )
    assert str(host_error(MemoryError(), "/data/a.npz")) == (
        "/data/a.npz: ENOMEM, out of memory: trouble of this host (ENOMEM, out of memory), no fault of the data"
    )
    with pytest.raises(HostError, match=r"^/data/b: "), host_errors("/data/b"):
        raise MemoryError
