"""A file of rows: what all containers have in common, and which container a file is.

    name                     first byte     container
    a.jsonl a.ndjson a.json  {              one JSON object per line
    a.jsonl a.ndjson a.json  [              one JSON array of objects
    a.parquet                PAR1           parquet

Each also as .gz or .zst (`unpack`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from loader_service.sources.jsonl import BYTE_ORDER_MARK
from stoker_proto.errors import DataError
from stoker_proto.host_trouble import check_host

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIX = ".parquet"
PACKED_SUFFIXES = (".gz", ".zst")
TABLE_PATTERNS = tuple(
    f"*{suffix}{packed}" for suffix in (*JSON_SUFFIXES, PARQUET_SUFFIX) for packed in ("", *PACKED_SUFFIXES)
)

_HEAD_BYTES = 64 << 10
_MAGICS = {
    b"\x1f\x8b": "gzip-compressed: call it NAME.gz",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: call it NAME.zst",
    b"PAR1": "parquet: call it NAME.parquet",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
}


class Span(NamedTuple):
    """Where a row lies, found without parsing it."""

    offset: int
    size: int
    problem: str | None
    """Why it cannot be a row, where that is seen without parsing."""


class ScannedRow(NamedTuple):
    """A row with its place."""

    offset: int
    size: int
    row: dict[str, Any] | DataError
    """Or why it is none."""


class Table(Protocol):
    """A file of rows. The offset of a row is a byte offset or a row number."""

    def cut(self, part_bytes: int) -> list[int]:
        """See `BaseSFTDataset.cut`."""

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """The rows that begin in bytes [start, stop) of the file, unparsed."""

    def rows(self, start: int, stop: int) -> Iterator[ScannedRow]:
        """The same, parsed."""

    def row(self, offset: int, size: int) -> dict[str, Any]:
        """One row. Raises DataError without a place."""

    def where(self, offset: int) -> tuple[str, str]:
        """(what to add to the file's name, name of the record) for error messages. May read all before the row."""


def plain_suffix(name: str) -> str:
    """The suffix that says what a file is, without the one of its compression: `a.tar.jsonl.GZ` -> `.jsonl`."""
    path = Path(name.lower())
    return (path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path).suffix


def open_table(path: Path, shard: Path, columns: tuple[str, ...] | None, needed: str | None = None) -> Table:
    """The table in `path`, the unpacked content of `shard`; columns, needed: see `ParquetTable`. Raises DataError."""
    # Imported here: each container's module knows the protocol above, and parquet's wants an extra.
    from loader_service.sources.tables.json_table import JsonArray, JsonLines

    head = _read_head(path)
    for magic, found in _MAGICS.items():
        if head.startswith(magic) and (magic, plain_suffix(shard.name)) != (b"PAR1", PARQUET_SUFFIX):
            raise DataError(f"it is {found}", file=str(shard))
    suffix = plain_suffix(shard.name)
    if suffix == PARQUET_SUFFIX:
        from loader_service.sources.tables.parquet import ParquetTable

        return ParquetTable(path, columns, needed)
    if suffix not in JSON_SUFFIXES:
        known = ", ".join((*JSON_SUFFIXES, PARQUET_SUFFIX))
        raise DataError(f"suffix {suffix!r}: {known} are read, each also with .gz or .zst", file=str(shard))
    first = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if first == b"[":
        return JsonArray(path)
    if first != b"{":
        shown = head[:40].decode("utf-8", "replace")
        reason = f"it begins with {shown!r}: JSON objects, one per line, or one JSON array of them are expected"
        raise DataError(reason, file=str(shard))
    return JsonLines(path)


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        check_host(error, str(path))
        raise DataError(f"the shard cannot be read ({error.strerror})", file=str(path)) from error
