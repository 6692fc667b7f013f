"""Whether an error comes from the host: no descriptors, no memory, no room, a disk or a network file system that fails.

    OSError(EMFILE)                                                   trouble of the host: the same read may succeed later
    OSError(ENOENT), ArrowInvalid("Parquet magic bytes not found")    says something of the data
    DataError("the video cannot be read") from av's OSError(EIO)      trouble of the host, whatever wraps it

Code that reads data asks here before it calls data bad. Bad data ends a run (`fail`) or costs samples (`skip`), on every loader
alike, and loader-prepare remembers it. Trouble of one host is none of these.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from stoker_proto.errors import DataError, HostError, StokerError

_NAMES = (
    *("EMFILE", "ENFILE"),  # descriptors
    *("ENOMEM", "ENOSPC", "EDQUOT", "ENOBUFS", "EAGAIN"),  # memory, room, buffers, threads
    *("EIO", "ENODEV", "EUCLEAN", "EBADMSG"),  # a disk, or its file system
    *("ESTALE", "EREMOTEIO", "ENOLINK", "ENOTCONN", "ESHUTDOWN", "ENOLCK", "EBUSY", "EINTR"),  # a mounted one
    *("ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EPIPE"),  # the way to a server
    *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
)
HOST_ERRNOS = frozenset(number for name in _NAMES if (number := getattr(errno, name, None)) is not None)
"""Other errors of `open` and `read` (no such file, no permission, a folder) count as errors of the data."""
_STRERRORS = {os.strerror(number): number for number in HOST_ERRNOS}
_WRITTEN_ERRNO = re.compile(r"\[errno (\d+)\]|\berrno = (\d+)\b", re.IGNORECASE)
"""As pyarrow, and as HDF5 write it into the text of what they wrap."""
_MOST_CAUSES = 32  # a chain of causes may be a circle


def host_error(error: BaseException, what: str = "") -> HostError | None:
    """The error as a HostError, if it or one of its causes is trouble of the host; else None.

    Among errors raised on purpose only a DataError is examined: a ConfigError about a full disk says the way out already.

    what: the file or the work that it happened to, where the error does not say so itself."""
    if isinstance(error, HostError):
        return error
    if isinstance(error, StokerError) and not isinstance(error, DataError):
        return None
    for cause in _causes(error):
        words = _trouble(cause)
        if words is not None:
            shown = " ".join(str(error if isinstance(error, DataError) else cause).split())[:300]
            named = what if what and what not in shown else ""
            return HostError(
                f"{named + ': ' if named else ''}{shown or words}: trouble of this host ({words}), no fault of the data"
            )
    return None


def check_host(error: BaseException, what: str = "") -> None:
    """Raises HostError if the error is trouble of the host. Call it before a verdict on data is made of the error."""
    trouble = host_error(error, what)
    if trouble is not None:
        raise trouble from error


@contextmanager
def host_errors(what: str) -> Iterator[None]:
    """Trouble of the host in the block becomes a HostError; everything else passes."""
    try:
        yield
    except Exception as error:
        check_host(error, what)
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or during, unless that was left out on purpose (`from None`)."""
    current: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if current is None:
            return
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _trouble(error: BaseException) -> str | None:
    """What is wrong with the host, in a few words."""
    if isinstance(error, MemoryError):
        return "ENOMEM, out of memory"
    if isinstance(error, TimeoutError):
        return "ETIMEDOUT, no answer in time"
    if isinstance(error, StokerError):  # its text is ours, and may quote anything
        return None
    number = getattr(error, "errno", None)  # also of av's errors that are no OSError
    text = str(error)
    if not isinstance(number, int) and isinstance(error, RuntimeError) and "can't start new thread" in text:
        number = errno.EAGAIN
    if not isinstance(number, int) and (written := _WRITTEN_ERRNO.search(text)) is not None:
        number = int(written[1] or written[2])
    if not isinstance(number, int) and isinstance(error, ImportError):  # the dynamic loader's words
        number = next((found for words, found in _STRERRORS.items() if words in text), None)
    if not isinstance(number, int) or number not in HOST_ERRNOS:
        return None
    return f"{errno.errorcode[number]}, {os.strerror(number)}"
