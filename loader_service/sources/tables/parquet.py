"""Parquet files as tables: the offset of a row is its number.

A row is read with its row group, in the needed columns; the process keeps some decoded groups. Random reads decode a group at
each miss of that cache; `unpack_parquet` avoids it (`arrow`).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loader_service.sources.parquet import ParquetReader, guarded
from loader_service.sources.tables.table import WEIGHTS, ScannedRow, Span, none_if_nan
from stoker_proto.errors import DataError

CACHE_BYTES = 256 << 20
"""Decoded row groups that a process keeps; the newest one is kept whatever its size."""
MAX_GROUP_BYTES = 1 << 30
"""A row group whose needed columns are larger than this, uncompressed, is refused."""
_BATCH_ROWS = 1024


_reader = ParquetReader(CACHE_BYTES, max_group_bytes=MAX_GROUP_BYTES)


class ParquetTable:
    """One parquet file, as it is when this is made."""

    def __init__(self, path: Path, columns: tuple[str, ...] | None, needed: tuple[str, ...] = ()) -> None:
        """columns: that are decoded, where the file has them; None: all. needed: of these, one that rows are useless
        without (`data.options.column`); any of several will do. Raises DataError."""
        self.path = path
        self._footer = _reader.footer(path)
        self.columns, self.other_columns = check_columns(self._footer.names, columns, needed)
        """Those that are decoded, and those that are not."""

    def cut(self, part_bytes: int) -> list[int]:
        """One part: only the end of the file says where its rows are."""
        return [0, self.path.stat().st_size]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """From the metadata alone."""
        for number in range(self._footer.starts[-1]):
            yield Span(number, 1, None)

    def rows(self, start: int, stop: int) -> Iterator[ScannedRow]:
        """Decoded batch by batch."""
        number = 0
        for batch in self.batches():
            for row in rows_of(batch, "parquet"):
                yield ScannedRow(number, 1, row)
                number += 1

    def row(self, offset: int, size: int) -> dict[str, Any]:
        """Row `offset`."""
        starts = self._footer.starts
        if offset >= starts[-1]:
            raise DataError(f"row {offset} of {starts[-1]}: it changed since it was scanned; run loader-prepare again")
        group = bisect.bisect_right(starts, offset) - 1
        decoded = _reader.groups(self._footer, group, group + 1, self.columns, keep=True)
        return row_of(decoded, offset - starts[group], "parquet")

    def where(self, offset: int) -> tuple[str, str]:
        """The row's number, from 0."""
        return "", f"row {offset}"

    def batches(self) -> Iterator[Any]:
        """All rows as pyarrow record batches."""
        for group in range(self._footer.num_groups):
            yield from _reader.batches(self._footer, group, group + 1, self.columns, batch_rows=_BATCH_ROWS)


def rows_of(batch: Any, kind: str) -> list[dict[str, Any] | DataError]:
    """The rows of a pyarrow batch. A row whose text is no UTF-8 is an error; the rows beside it are read."""
    try:
        return [_without_nan(row) for row in guarded(batch.to_pylist, kind)]
    except DataError:
        rows: list[dict[str, Any] | DataError] = []
        for i in range(batch.num_rows):
            try:
                rows.append(row_of(batch, i, kind))
            except DataError as error:
                rows.append(error)
        return rows


def row_of(batch: Any, number: int, kind: str) -> dict[str, Any]:
    """Row `number` of a pyarrow batch or table. Raises DataError."""
    [row] = guarded(batch.slice(number, 1).to_pylist, kind)
    return _without_nan(row)


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """The row with None for NaN, which other programs write for what is missing. A weight that is NaN stays: it is refused."""
    return {name: value if name in WEIGHTS else none_if_nan(value) for name, value in row.items()}


def check_columns(
    names: Sequence[str], columns: tuple[str, ...] | None, needed: tuple[str, ...]
) -> tuple[list[str], tuple[str, ...]]:
    """Of the columns of a file: (those that are decoded, the others). Raises DataError.

    columns: that are wanted; None: all. needed: see `ParquetTable`.
    """
    if needed and not any(name in names for name in needed):
        reason = f"it is not there; there are {', '.join(names) or 'none'}: name the right one in data.options.column"
        raise DataError(reason, field=needed[0])
    wanted = [name for name in names if columns is None or name in columns]
    if not wanted:
        raise DataError(f"none of the columns {', '.join(columns or ())} is there; it has {', '.join(names) or 'none'}")
    return wanted, tuple(name for name in names if name not in wanted)
