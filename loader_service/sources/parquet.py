"""Parquet files, read by row groups: the one reader below `tables.parquet` and `lerobot.rows`.

A row group is decoded as a whole, in the columns that are asked for. Decoded groups are kept in a cache of bounded size, because
one group often holds many records.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loader_service.sources.extras import library
from loader_service.sources.lfs import refuse_pointer
from stoker_proto.errors import DataError
from stoker_proto.host.trouble import check_host

_MAX_FOOTERS = 64


class Footer(NamedTuple):
    """The footer of a parquet file, as it was when it was read."""

    path: Path
    stamp: tuple[int, int, int]  # size in bytes, time of the last change in ns, inode
    metadata: Any
    names: tuple[str, ...]
    """Columns."""
    starts: list[int]
    """[groups + 1]: number of the first row of each row group, and of all rows."""

    @property
    def num_groups(self) -> int:
        """Row groups in the file."""
        return len(self.starts) - 1


class ParquetReader:
    """Footers and decoded row groups of many files. Used by several threads at once. Raises DataError naming the file."""

    def __init__(
        self, cache_bytes: int, local: Callable[[Path], Path] | None = None, max_group_bytes: int | None = None
    ) -> None:
        """cache_bytes: decoded groups that are kept; the newest is kept whatever its size. local: brings a file here.
        max_group_bytes: a group whose columns are larger, uncompressed, is refused; None: no limit."""
        self._cache_bytes, self._local = cache_bytes, local or (lambda path: path)
        self._max_group_bytes = max_group_bytes
        self._lock = threading.Lock()
        self._footers: OrderedDict[Path, Footer] = OrderedDict()
        self._groups: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._size_bytes = 0

    def footer(self, path: Path) -> Footer:
        """The file's footer; read again if the file changed."""
        return guarded(lambda: self._footer(path), "parquet", str(path))  # type: ignore[no-any-return]

    def groups(self, footer: Footer, first: int, last: int, columns: Sequence[str], *, keep: bool) -> Any:
        """The row groups [first, last) as a pyarrow table of these columns. keep: in the cache."""
        key = (footer.path, footer.stamp, first, last, *columns)
        if keep:
            with self._lock:
                table = self._groups.get(key)
                if table is not None:
                    self._groups.move_to_end(key)
                    return table
        wanted = self._checked(footer, range(first, last), columns)
        table = guarded(
            lambda: self._open(footer).read_row_groups(wanted, columns=list(columns), use_threads=False),
            "parquet",
            str(footer.path),
        )
        if keep:
            self._keep(key, table)
        return table

    def batches(
        self, footer: Footer, first: int, last: int, columns: Sequence[str], *, batch_rows: int, buffer_size: int = 0
    ) -> Iterator[Any]:
        """The rows of the groups [first, last) as record batches, decoded one after another. buffer_size: bytes; 0: default."""
        wanted, file = self._checked(footer, range(first, last), columns), str(footer.path)
        batches = guarded(
            lambda: self._open(footer, buffer_size).iter_batches(
                batch_rows, row_groups=wanted, columns=list(columns), use_threads=False
            ),
            "parquet",
            file,
        )
        while (batch := guarded(lambda: next(batches, None), "parquet", file)) is not None:
            yield batch

    def _footer(self, path: Path) -> Footer:
        status = self._local(path).stat()
        stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
        with self._lock:
            footer = self._footers.get(path)
            if footer is not None and footer.stamp == stamp:
                self._footers.move_to_end(path)
                return footer
        metadata = library("pyarrow.parquet").read_metadata(path)
        starts = [0]
        for group in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(group).num_rows)
        footer = Footer(path, stamp, metadata, tuple(metadata.schema.to_arrow_schema().names), starts)
        with self._lock:
            self._footers[path] = footer
            if len(self._footers) > _MAX_FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def _checked(self, footer: Footer, groups: Iterable[int], columns: Sequence[str]) -> list[int]:
        """The groups. Raises DataError for one that is too large to be decoded."""
        groups = list(groups)
        if self._max_group_bytes is not None:
            wanted = set(columns)
            for group in groups:
                description = footer.metadata.row_group(group)
                chunks = [description.column(i) for i in range(description.num_columns)]
                size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in wanted)
                if size > self._max_group_bytes:
                    raise DataError(
                        f"row group {group} has {size} bytes in the columns {', '.join(columns)}, and at most "
                        f"{self._max_group_bytes} are read at once: write the file with smaller row groups (1,000 rows)",
                        file=str(footer.path),
                    )
        return groups

    def _open(self, footer: Footer, buffer_size: int = 0) -> Any:
        return library("pyarrow.parquet").ParquetFile(
            self._local(footer.path), metadata=footer.metadata, pre_buffer=False, buffer_size=buffer_size
        )

    def _keep(self, key: tuple[Any, ...], table: Any) -> None:
        with self._lock:
            if key not in self._groups:
                self._groups[key] = table
                self._size_bytes += table.nbytes
            while self._size_bytes > self._cache_bytes and len(self._groups) > 1:
                self._size_bytes -= self._groups.popitem(last=False)[1].nbytes


def guarded(read: Callable[[], Any], kind: str, file: str = "") -> Any:
    """What `read` returns. What pyarrow raises for a damaged file of this kind becomes a DataError."""
    arrow = library("pyarrow")
    try:
        return read()
    except (arrow.ArrowException, OSError, ValueError) as error:
        check_host(error, file or kind)
        if file:
            refuse_pointer(file)
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"unreadable {kind} ({type(error).__name__}: {reason}): copy or write it again", file=file
        ) from error
