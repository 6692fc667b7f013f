"""Parquet unpacked for random access: an Arrow IPC file of the needed columns, mapped into memory, never copied.

A row is found in about 10 us, where parquet decodes a whole row group. It takes the room of the columns, uncompressed, in the
cache folder.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader_service.sources.extras import library
from loader_service.sources.parquet import guarded
from loader_service.sources.tables.parquet import ParquetTable, row_of, rows_of
from loader_service.sources.tables.table import ScannedRow, Span
from stoker_proto.errors import DataError


def write_arrow(parquet: ParquetTable, target: Path, check_room: Any) -> None:
    """Write the rows of the parquet file to `target`; check_room() is called now and then. Raises DataError."""
    arrow = library("pyarrow")
    writer = None
    try:
        for number, batch in enumerate(parquet.batches()):
            if number % 64 == 0:
                check_room()
            plain = arrow.table(
                {name: _without_dictionary(batch.column(name)) for name in batch.schema.names}
            ).combine_chunks()
            if writer is None:
                writer = arrow.ipc.new_file(str(target), plain.schema)
            writer.write_table(plain)
        if writer is None:
            raise DataError("a parquet file without a row: write it again, or remove it")
    finally:
        if writer is not None:
            writer.close()


def _without_dictionary(column: Any) -> Any:
    """Categories as plain values: dictionaries that differ from batch to batch have no place in an IPC file."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


class ArrowTable:
    """One IPC file; the offset of a row is its number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        arrow = library("pyarrow")
        reader = guarded(lambda: arrow.ipc.open_file(arrow.memory_map(str(path))), "Arrow file")
        # All at once, while one thread has the reader: they are views of the mapped file.
        self._batches = [guarded(lambda: reader.get_batch(i), "Arrow file") for i in range(reader.num_record_batches)]  # noqa: B023
        self._firsts = list(itertools.accumulate((batch.num_rows for batch in self._batches), initial=0))

    def cut(self, part_bytes: int) -> list[int]:
        """One part."""
        return [0, self.path.stat().st_size]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """The rows' numbers."""
        for number in range(self._firsts[-1]):
            yield Span(number, 1, None)

    def rows(self, start: int, stop: int) -> Iterator[ScannedRow]:
        """Batch by batch."""
        for first, batch in zip(self._firsts, self._batches, strict=False):
            for number, row in enumerate(rows_of(batch, "Arrow file"), first):
                yield ScannedRow(number, 1, row)

    def row(self, offset: int, size: int) -> dict[str, Any]:
        """Row `offset`."""
        if offset >= self._firsts[-1]:
            raise DataError(
                f"row {offset} of {self._firsts[-1]}: it changed since it was scanned; run loader-prepare again"
            )
        number = bisect.bisect_right(self._firsts, offset) - 1
        return row_of(self._batches[number], offset - self._firsts[number], "Arrow file")

    def where(self, offset: int) -> tuple[str, str]:
        """The row's number, from 0."""
        return "", f"row {offset}"
