"""Parquet files as tables: the offset of a row is its number.

A row is read with its whole row group, of which only the needed columns are decoded; decoded groups are kept in a small cache of
the process. Reading rows at random costs a group's decoding each time the cache misses; `unpack_parquet` spares that
(`arrow`).
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from loader_service.sources.tables.extras import guarded, require, row_of, rows_of
from loader_service.sources.tables.table import ScannedRow, Span
from stoker_proto.errors import DataError

CACHE_BYTES = 256 << 20
"""Decoded row groups that a process keeps; the newest one is kept whatever its size."""
MAX_GROUP_BYTES = 1 << 30
"""A row group whose needed columns are larger than this, uncompressed, is refused."""
_BATCH_ROWS = 1024


class _GroupCache:
    """Decoded row groups (pyarrow tables) by file, stamp, number and columns; least recently used ones go first."""

    def __init__(self) -> None:
        self._groups: OrderedDict[Any, Any] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            group = self._groups.get(key)
            if group is not None:
                self._groups.move_to_end(key)
            return group

    def put(self, key: Any, group: Any) -> None:
        with self._lock:
            if key in self._groups:
                return
            self._groups[key] = group
            self._num_bytes += group.nbytes
            while self._num_bytes > CACHE_BYTES and len(self._groups) > 1:
                self._num_bytes -= self._groups.popitem(last=False)[1].nbytes


_cache = _GroupCache()


class ParquetTable:
    """One parquet file, as it is when this is made."""

    def __init__(self, path: Path, columns: tuple[str, ...] | None, needed: str | None = None) -> None:
        """columns: that are decoded, where the file has them; None: all. needed: of these, the one that rows are useless
        without (`data.options.column`). Raises DataError."""
        self.path = path
        self._parquet = require("pyarrow.parquet", "reading parquet")
        status = path.stat()
        self._key = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        self._metadata = guarded(lambda: self._parquet.read_metadata(path), "parquet")
        names = guarded(lambda: self._metadata.schema.to_arrow_schema().names, "parquet")
        if needed is not None and needed not in names:
            reason = (
                f"it is not there; there are {', '.join(names) or 'none'}: name the right one in data.options.column"
            )
            raise DataError(reason, field=needed)
        self.columns: list[str] = [name for name in names if columns is None or name in columns]
        if not self.columns:
            raise DataError(
                f"none of the columns {', '.join(columns or ())} is there; it has {', '.join(names) or 'none'}"
            )

    @cached_property
    def _first_rows(self) -> list[int]:
        """[groups + 1]: number of the first row of each row group, and of all rows."""
        firsts = [0]
        for group in range(self._metadata.num_row_groups):
            firsts.append(firsts[-1] + self._metadata.row_group(group).num_rows)
        return firsts

    def cut(self, part_bytes: int) -> list[int]:
        """One part: only the end of the file says where its rows are."""
        return [0, self.path.stat().st_size]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """From the metadata alone."""
        for number in range(self._metadata.num_rows):
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
        firsts = self._first_rows
        if offset >= firsts[-1]:
            raise DataError(f"row {offset} of {firsts[-1]}: it changed since it was scanned; run loader-prepare again")
        group = bisect.bisect_right(firsts, offset) - 1
        key = (*self._key, group, *self.columns)
        decoded = _cache.get(key)
        if decoded is None:
            self._check_size(group)
            decoded = guarded(lambda: self._open().read_row_group(group, self.columns, use_threads=False), "parquet")
            _cache.put(key, decoded)
        return row_of(decoded, offset - firsts[group], "parquet")

    def where(self, offset: int) -> tuple[str, str]:
        """The row's number, from 0."""
        return "", f"row {offset}"

    def batches(self) -> Iterator[Any]:
        """All rows as pyarrow record batches."""
        for group in range(self._metadata.num_row_groups):
            self._check_size(group)
            batches = guarded(lambda: self._open().iter_batches(_BATCH_ROWS, [group], self.columns, False), "parquet")  # noqa: B023
            while (batch := guarded(lambda: next(batches, None), "parquet")) is not None:  # noqa: B023 - called at once
                yield batch

    def _open(self) -> Any:
        return self._parquet.ParquetFile(self.path, metadata=self._metadata)

    def _check_size(self, group: int) -> None:
        description = self._metadata.row_group(group)
        columns = [description.column(i) for i in range(description.num_columns)]
        wanted = set(self.columns)
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in wanted)
        if size > MAX_GROUP_BYTES:
            raise DataError(
                f"row group {group} has {size} bytes in the columns {', '.join(self.columns)}, and at most {MAX_GROUP_BYTES} are "
                "read at once: write the file with smaller row groups (1,000 rows)"
            )
