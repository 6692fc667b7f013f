"""Arrow files as tables, mapped into memory, never copied: those of the datasets library, and parquet that was unpacked.

    data-00000-of-00002.arrow      a stream of record batches, as `save_to_disk` and the cache of datasets write it
    a.arrow                        or an IPC file (magic ARROW1), whose end says where its batches are

`unpack_parquet` writes an IPC file of the needed columns, so that a row is found in about 10 us, where parquet decodes a whole
row group. It takes the room of the columns, uncompressed, in the cache folder.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader_service.sources.extras import library
from loader_service.sources.parquet import guarded
from loader_service.sources.tables.parquet import ParquetTable, check_columns, row_of, rows_of
from loader_service.sources.tables.table import ScannedRow, Span
from stoker_proto.errors import DataError

_KIND = "Arrow file"
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_OTHER_COLUMNS = b"stoker_other_columns"  # of the unpacked parquet file, which has the needed ones only


def write_arrow(parquet: ParquetTable, target: Path, check_room: Any) -> None:
    """Write the rows of the parquet file to `target`; check_room() is called now and then. Raises DataError."""
    arrow = library("pyarrow")
    metadata = {_OTHER_COLUMNS: json.dumps(parquet.other_columns)}
    writer = None
    try:
        for number, batch in enumerate(parquet.batches()):
            if number % 64 == 0:
                check_room()
            plain = arrow.table(
                {name: _without_dictionary(batch.column(name)) for name in batch.schema.names}
            ).combine_chunks()
            if writer is None:
                writer = arrow.ipc.new_file(str(target), plain.schema.with_metadata(metadata))
            writer.write_table(plain.replace_schema_metadata(metadata))
        if writer is None:
            raise DataError("a parquet file without a row: write it again, or remove it")
    finally:
        if writer is not None:
            writer.close()


def _without_dictionary(column: Any) -> Any:
    """Categories as plain values: dictionaries that differ from batch to batch have no place in an IPC file."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


class ArrowTable:
    """One Arrow file; the offset of a row is its number."""

    def __init__(self, path: Path, columns: tuple[str, ...] | None = None, needed: tuple[str, ...] = ()) -> None:
        """columns, needed: as of `ParquetTable`. Raises DataError."""
        self.path = path
        self._arrow = library("pyarrow")
        mapped = guarded(lambda: self._arrow.memory_map(str(path)), _KIND)
        schema, batches = self._read(mapped)
        self.columns, others = check_columns(schema.names, columns, needed)
        self.other_columns = (*others, *_noted(schema))
        """Those that are not decoded."""
        self._batches = [guarded(lambda: batch.select(self.columns), _KIND) for batch in batches]  # noqa: B023 - called at once
        self._firsts = list(itertools.accumulate((batch.num_rows for batch in self._batches), initial=0))

    def _read(self, mapped: Any) -> tuple[Any, list[Any]]:
        """(schema, record batches) of the mapped file."""
        if mapped.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            reader = guarded(lambda: self._arrow.ipc.open_file(mapped), _KIND)
            # All at once, while one thread has the reader: they are views of the mapped file.
            numbers = range(reader.num_record_batches)
            return reader.schema, [guarded(lambda: reader.get_batch(i), _KIND) for i in numbers]  # noqa: B023
        self._check_end(mapped)
        mapped.seek(0)
        reader = guarded(lambda: self._arrow.ipc.open_stream(mapped), _KIND)
        batches = []
        while (batch := guarded(lambda: next(reader, None), _KIND)) is not None:
            batches.append(batch)
        return reader.schema, batches

    def _check_end(self, mapped: Any) -> None:
        """A stream that is cut between two batches reads as a shorter one."""
        size = mapped.size()
        mapped.seek(max(size - len(_STREAM_END), 0))
        if mapped.read(len(_STREAM_END)) != _STREAM_END:
            raise DataError(
                f"no whole Arrow stream: its {size} bytes do not end with the mark of the end; copy it again, or "
                "write it with Arrow 0.15 or later"
            )

    def cut(self, part_bytes: int) -> list[int]:
        """One part."""
        return [0, self.path.stat().st_size]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """The rows' numbers."""
        for number in range(self._firsts[-1]):
            yield Span(number, 1, None)

    def rows(self, start: int, stop: int) -> Iterator[ScannedRow]:
        """A thousand at a time: a batch may be large."""
        for first, batch in zip(self._firsts, self._batches, strict=False):
            for begin in range(0, batch.num_rows, _SLICE_ROWS):
                for number, row in enumerate(rows_of(batch.slice(begin, _SLICE_ROWS), _KIND), first + begin):
                    yield ScannedRow(number, 1, row)

    def row(self, offset: int, size: int) -> dict[str, Any]:
        """Row `offset`."""
        if offset >= self._firsts[-1]:
            raise DataError(
                f"row {offset} of {self._firsts[-1]}: it changed since it was scanned; run loader-prepare again"
            )
        number = bisect.bisect_right(self._firsts, offset) - 1
        return row_of(self._batches[number], offset - self._firsts[number], _KIND)

    def where(self, offset: int) -> tuple[str, str]:
        """The row's number, from 0."""
        return "", f"row {offset}"


_SLICE_ROWS = 1024


def _noted(schema: Any) -> tuple[str, ...]:
    """Columns that the parquet file had and this one has not."""
    noted = (schema.metadata or {}).get(_OTHER_COLUMNS)
    return () if noted is None else tuple(map(str, json.loads(noted)))
