"""Rows of data files by number: whole columns for the scan, one episode's for a read, images as a stream.

A parquet is decoded by row groups. Where a group holds one episode, as lerobot writes it, nothing is decoded twice; converted
data sets have groups of many episodes. Their numeric columns are kept, so that they are not decoded again for each episode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loader_service.sources.lerobot.files import Files
from loader_service.sources.parquet import Footer, ParquetReader
from stoker_proto.errors import DataError

_CACHE_BYTES = 64 << 20
_BATCH_ROWS = 8  # encoded images in memory at once


class RowReader:
    """Used by several threads at once. Raises DataError: unreadable, too short, or a column missing."""

    def __init__(self, files: Files | None = None) -> None:
        """files: default: all files are here."""
        self.files = files or Files(None)
        self._parquet = ParquetReader(_CACHE_BYTES, self.files.local)

    def num_rows(self, file: Path) -> int:
        """Rows of a data file."""
        return self._parquet.footer(file).starts[-1]

    def read(self, file: Path, start: int, stop: int, names: Sequence[str]) -> Any:
        """Rows [start, stop) of the columns as a pyarrow table."""
        footer = self._parquet.footer(file)
        first, last = _groups(footer, start, stop, names)
        base = footer.starts[first]
        is_shared = footer.starts[last] - base > 2 * (stop - start)
        table = self._parquet.groups(footer, first, last, names, keep=is_shared)
        return table.slice(start - base, stop - start)

    def images(self, file: Path, start: int, stop: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows [start, stop), one after another: column -> {"bytes": ..., "path": ...}. A few rows are in memory at once."""
        footer = self._parquet.footer(file)
        first, last = _groups(footer, start, stop, names)
        position = footer.starts[first]
        for batch in self._parquet.batches(footer, first, last, names, batch_rows=_BATCH_ROWS, buffer_size=1 << 20):
            for row in range(max(start - position, 0), min(stop - position, len(batch))):
                yield {name: batch.column(name)[row].as_py() for name in names}
            position += len(batch)
            if position >= stop:
                return


def _groups(footer: Footer, start: int, stop: int, names: Sequence[str]) -> tuple[int, int]:
    """Half-open range of the row groups that hold the rows [start, stop)."""
    for name in names:
        if name not in footer.names:
            raise DataError("the column is missing", file=str(footer.path), field=name)
    if stop > footer.starts[-1]:
        raise DataError(
            f"{footer.starts[-1]} rows, and row {stop - 1} is wanted: it changed since it was scanned, or meta/ belongs to "
            "other data; run loader-prepare again",
            file=str(footer.path),
        )
    first = int(np.searchsorted(footer.starts, start, side="right")) - 1
    return first, max(int(np.searchsorted(footer.starts, stop, side="left")), first + 1)
