"""Every error that Stoker raises on purpose; the type says whose fault it is.

    StokerError
    ├── ConfigError        the user's YAML, flags or paths: fix the named key
    ├── DataError          a dataset: names file, record and field
    │   ├── ManifestError  what `loader-prepare` found is missing, stale or of another version
    │   └── RowError       a sample that this config cannot write as a row: too long, or of a form its dialogue does not have
    ├── ProtocolError      a message
    │   ├── LocalProtocolError   our own code asked for something that the protocol forbids
    │   └── RemoteProtocolError  the other side sent something that the protocol forbids
    ├── RefusedError       a loader and a trainer do not agree on what a batch means; carries the diff
    ├── FetchError         a file cannot be had as it was scanned, mostly a remote one: names it, and why; it may come later
    │   └── HostError      trouble of this host (descriptors, memory, room, a failing disk): see `host_trouble`
    └── DeadlineError      nothing came in time: names loaders, what is missing and the last contact

All messages are one line: the value, the rule that it breaks, and the way out. Entry points print them without a
traceback and exit with a non-zero code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StokerError(Exception):
    """Base of all errors that are raised on purpose."""


class ConfigError(StokerError):
    """The configuration cannot mean what it says."""


class DataError(StokerError):
    """A shard, a record or a sample is not what its format promises."""

    def __init__(self, reason: str, *, file: str = "", record: str = "", field: str = "") -> None:
        self.reason, self.file, self.record, self.field = reason, file, record, field
        where = ", ".join(f"{name} {value}" for name, value in (("record", record), ("field", field)) if value)
        prefix = f"{file}: " if file else ""
        super().__init__(f"{prefix}{where}: {reason}" if where else f"{prefix}{reason}")


class ManifestError(DataError):
    """A manifest is missing, stale, damaged, or written by another version."""


class RowError(DataError):
    """A sample is sound, but this config cannot write it as a row: all samples like it will fail, which a start can find."""


class ProtocolError(StokerError):
    """A message breaks the protocol."""


class LocalProtocolError(ProtocolError):
    """Our own side tried to send or to do what the protocol forbids."""


class RemoteProtocolError(ProtocolError):
    """The other side sent what the protocol forbids."""


class RefusedError(StokerError):
    """Loader and trainer differ in what a batch means (data, tokenizer, codec, transform, plan, protocol)."""


class FetchError(StokerError):
    """A remote file could not be fetched, or a shard is not what was scanned. No DataError: the data may be well, so no sample of
    it is skipped as a bad one."""


class HostError(FetchError):
    """This host cannot read now: it is out of descriptors, memory or room, or its disk or network fails. It says nothing of the
    data, so no sample is skipped; a loader answers FAILURE(unavailable), and the rank asks again, or another loader."""


class DeadlineError(StokerError):
    """Something that was waited for did not come in time."""


@contextmanager
def located(*, file: str = "", record: str = "", field: str = "") -> Iterator[None]:
    """Give a DataError raised inside the place where it happened, unless it already names one."""
    try:
        yield
    except DataError as error:
        kind = type(error)
        raise kind(
            error.reason,
            file=error.file or file,
            record=error.record or record,
            field=error.field or field,
        ) from error
