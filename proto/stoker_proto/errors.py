"""Every error that Stoker raises on purpose; the type says whose fault it is.

    StokerError
    ├── ConfigError        the user's YAML, flags or paths: fix the named key
    ├── DataError          a dataset: names file, record and field
    │   ├── ManifestError  the manifest of `loader-prepare` is missing, stale or of another version
    │   └── RowError       a sample that this config cannot write as a row: too long, or in a form that its template lacks
    ├── ProtocolError      a message
    │   ├── LocalProtocolError   our own code asked for something that the protocol forbids
    │   └── RemoteProtocolError  the other side sent something that the protocol forbids
    ├── RefusedError       a loader and a trainer do not agree on what a batch means; carries the diff
    ├── FetchError         a file, mostly a remote one, cannot be read as it was scanned; a retry may succeed
    │   └── HostError      this host is in trouble (descriptors, memory, room, a failing disk): see `host.trouble`
    └── DeadlineError      a wait took too long: names the loaders, what is missing and the last contact

A message is one line: the value, the rule that it breaks, and the way out. Entry points print it without a traceback and exit
with a non-zero code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StokerError(Exception):
    """Base of all errors that are raised on purpose."""


class ConfigError(StokerError):
    """The configuration is not valid."""


class DataError(StokerError):
    """A shard, a record or a sample breaks the rules of its format."""

    def __init__(self, reason: str, *, file: str = "", record: str = "", field: str = "") -> None:
        self.reason, self.file, self.record, self.field = reason, file, record, field
        where = ", ".join(f"{name} {value}" for name, value in (("record", record), ("field", field)) if value)
        prefix = f"{file}: " if file else ""
        super().__init__(f"{prefix}{where}: {reason}" if where else f"{prefix}{reason}")


class ManifestError(DataError):
    """A manifest is missing, stale, damaged, or written by another version."""


class RowError(DataError):
    """A valid sample that this config cannot write as a row. All samples like it will fail, so the start of a run can find it."""


class ProtocolError(StokerError):
    """A message breaks the protocol."""


class LocalProtocolError(ProtocolError):
    """Our own code tried to send or do something that the protocol forbids."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something that the protocol forbids."""


class RefusedError(StokerError):
    """Loader and trainer disagree on what a batch means (data, tokenizer, codec, transform, plan, protocol)."""


class FetchError(StokerError):
    """A remote file could not be fetched, or a shard changed after its scan. It is not a DataError: the data may be sound, so its
    samples are not skipped as bad ones."""


class HostError(FetchError):
    """This host cannot read now: it is out of descriptors, memory or room, or its disk or network fails. It says nothing of the
    data, so no sample is skipped; a loader answers FAILURE(unavailable), and the rank asks again, or another loader."""


class DeadlineError(StokerError):
    """A wait passed its deadline."""


@contextmanager
def located(*, file: str = "", record: str = "", field: str = "") -> Iterator[None]:
    """Add file, record and field to a DataError raised inside; those that it names already stay."""
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
