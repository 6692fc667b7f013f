"""A file of rows: what every kind of file offers (`Table`), and the suffixes of files that hold rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stoker_proto.errors import DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIX, ARROW_SUFFIX = ".parquet", ".arrow"
PACKED_SUFFIXES = (".gz", ".zst")
TABLE_PATTERNS = tuple(
    f"*{suffix}{packed}"
    for suffix in (*JSON_SUFFIXES, PARQUET_SUFFIX, ARROW_SUFFIX)
    for packed in ("", *PACKED_SUFFIXES)
)

WEIGHTS = ("weight", "loss_weight")
"""Fields in which NaN is not read as "missing": a turn without a weight is learned."""

TOO_DEEP = "lists or objects are nested hundreds of levels deep: remove the row"


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


def none_if_nan(value: Any) -> Any:
    """The value; None for a float that is no finite number."""
    return None if type(value) is float and not math.isfinite(value) else value


def plain_suffix(name: str) -> str:
    """The suffix that says what a file is, without the one of its compression: `a.tar.jsonl.GZ` -> `.jsonl`."""
    path = Path(name.lower())
    return (path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path).suffix
