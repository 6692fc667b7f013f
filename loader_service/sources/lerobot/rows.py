"""Rows of data files by number: whole columns for the scan, one episode's for a read, images as a stream.

A parquet is decoded by row groups. Where a group holds one episode, as lerobot writes it, nothing is decoded twice; converted
data sets have groups of many episodes, whose numeric columns are kept, so that each episode does not decode them anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.lerobot.extras import library
from loader_service.sources.lerobot.files import Files
from stoker_proto.errors import DataError
from stoker_proto.host_trouble import check_host

_CACHE_BYTES = 64 << 20
_KEEP_FOOTERS = 64
_BATCH_ROWS = 8  # encoded images in memory at once


class _Footer(NamedTuple):
    stamp: tuple[int, int]
    metadata: Any
    names: frozenset[str]
    starts: NDArray[np.int64]  # [groups + 1], first row of each group


class RowReader:
    """Used by several threads at once. What it keeps is only decoded anew if it is dropped."""

    def __init__(self, files: Files | None = None) -> None:
        """files: default: all files are here."""
        self.files = files or Files(None)
        self._lock = threading.Lock()
        self._footers: OrderedDict[Path, _Footer] = OrderedDict()
        self._tables: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._size_bytes = 0

    def num_rows(self, file: Path) -> int:
        """Rows of a data file. Raises DataError."""
        with _readable(file):
            return int(self._footer(file).starts[-1])

    def read(self, file: Path, start: int, stop: int, names: Sequence[str]) -> Any:
        """Rows [start, stop) of the columns as a pyarrow table. Raises DataError: unreadable, too short, or a column missing."""
        with _readable(file):
            footer = self._footer(file)
            first, last = self._groups(footer, file, start, stop, names)
            base = int(footer.starts[first])
            is_shared = int(footer.starts[last]) - base > 2 * (stop - start)
            key = (file, footer.stamp, first, last, tuple(names))
            table = self._kept(key) if is_shared else None
            if table is None:
                table = self._open(file, footer).read_row_groups(
                    list(range(first, last)), columns=list(names), use_threads=False
                )
                if is_shared:
                    self._keep(key, table)
            return table.slice(start - base, stop - start)

    def images(self, file: Path, start: int, stop: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Of rows [start, stop), one after another: column -> {"bytes": ..., "path": ...}. A few rows are held at once."""
        with _readable(file):
            footer = self._footer(file)
            first, last = self._groups(footer, file, start, stop, names)
            batches = self._open(file, footer, buffer_size=1 << 20).iter_batches(
                _BATCH_ROWS, row_groups=list(range(first, last)), columns=list(names), use_threads=False
            )
        position = int(footer.starts[first])
        while position < stop:
            with _readable(file):
                batch = next(batches)
            for row in range(max(start - position, 0), min(stop - position, len(batch))):
                yield {name: batch.column(name)[row].as_py() for name in names}
            position += len(batch)

    def _groups(self, footer: _Footer, file: Path, start: int, stop: int, names: Sequence[str]) -> tuple[int, int]:
        """Half-open range of the row groups that hold the rows."""
        for name in names:
            if name not in footer.names:
                raise DataError("the column is missing", file=str(file), field=name)
        if stop > footer.starts[-1]:
            raise DataError(
                f"{int(footer.starts[-1])} rows, and row {stop - 1} is wanted: it changed since it was scanned, or "
                "meta/ belongs to other data; run loader-prepare again",
                file=str(file),
            )
        first = int(np.searchsorted(footer.starts, start, side="right")) - 1
        return first, max(int(np.searchsorted(footer.starts, stop, side="left")), first + 1)

    def _footer(self, file: Path) -> _Footer:
        status = self.files.local(file).stat()
        stamp = (status.st_size, status.st_mtime_ns)
        with self._lock:
            footer = self._footers.get(file)
            if footer is not None and footer.stamp == stamp:
                self._footers.move_to_end(file)
                return footer
        metadata = library("pyarrow.parquet").read_metadata(file)
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        footer = _Footer(stamp, metadata, frozenset(metadata.schema.to_arrow_schema().names), starts)
        with self._lock:
            self._footers[file] = footer
            if len(self._footers) > _KEEP_FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def _open(self, file: Path, footer: _Footer, buffer_size: int = 0) -> Any:
        return library("pyarrow.parquet").ParquetFile(
            self.files.local(file), metadata=footer.metadata, pre_buffer=False, buffer_size=buffer_size
        )

    def _kept(self, key: tuple[Any, ...]) -> Any:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def _keep(self, key: tuple[Any, ...], table: Any) -> None:
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self._size_bytes += table.nbytes
            while self._size_bytes > _CACHE_BYTES and len(self._tables) > 1:
                _, dropped = self._tables.popitem(last=False)
                self._size_bytes -= dropped.nbytes


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    arrow = library("pyarrow")
    try:
        yield
    except (OSError, arrow.ArrowException) as error:
        check_host(error, str(file))
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"the parquet cannot be read ({reason})", file=str(file)) from error
