"""What `chat`, `code` and `text` share: a record is a row of a table, and gives one sample.

A subclass defines the sample of a row (`sample`), which rows are left out (`left_out`), and the columns that it needs. The scan
finds the places of rows; it parses them only if some may be left out, or with `validate`. Of the first rows of each part it
names the fields that are not read.
"""

from __future__ import annotations

import itertools
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from loader_service.shards import EntryShards, Stamp
from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord
from loader_service.sources.extras import library
from loader_service.sources.fields import OF_THE_FIRST, unread_note
from loader_service.sources.jsonl import held_open
from loader_service.sources.tables.arrow import ArrowTable
from loader_service.sources.tables.open_table import open_table
from loader_service.sources.tables.saved_folder import check_not_splits, only_data
from loader_service.sources.tables.table import (
    ARROW_SUFFIX,
    JSON_SUFFIXES,
    PACKED_SUFFIXES,
    PARQUET_SUFFIX,
    TABLE_PATTERNS,
    TOO_DEEP,
    Table,
    plain_suffix,
)
from loader_service.sources.tables.unpack import arrow_file, plain_file
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, DataError

_LOOKED_AT = 1000
"""Rows of a part whose fields are looked at where rows need not be parsed: 10 ms."""
_SOME = f"{OF_THE_FIRST}{_LOOKED_AT:,} rows of each part; data.options.validate looks at all)"
_MAX_OPEN = 1024
"""Open tables that are remembered: a few hundred bytes each."""


class _Opened(NamedTuple):
    stamp: Stamp
    table: Table
    plain: Path
    """The shard, or its unpacked content."""
    stop: int
    """Size of the plain file."""
    kind: str


class TableDataset(BaseSFTDataset):
    """Rows of tables, one sample each."""

    is_text: ClassVar[bool] = True
    version: ClassVar[int] = 3  # labels beside input_ids, fields beside the content of turns, weights that are NaN
    shard_patterns: ClassVar[tuple[str, ...]] = TABLE_PATTERNS
    same_format: ClassVar[tuple[tuple[str, ...], ...]] = (JSON_SUFFIXES,)
    """Suffixes that may stand beside each other in one entry."""
    usual: ClassVar[Collection[str]] = ()
    """Columns that such data usually has, and that need not be named where they are not read."""
    validate = False
    """Parse and check every row in the scan."""
    filters = False
    """Whether `left_out` may leave rows out: then the scan parses them."""

    unpack_parquet = False
    """Unpack parquet files into the cache folder, for quick random access (`arrow`)."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self._opened: OrderedDict[Path, _Opened] = OrderedDict()
        self._lock = threading.Lock()
        self._block = threading.local()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In each block a shard is checked for changes, and opened, only once."""
        with super().reading(), held_open():
            outer, self._block.opened = getattr(self._block, "opened", None), {}
            try:
                yield
            finally:
                self._block.opened = outer

    def preload(self, shards: Sequence[Path]) -> None:
        """pyarrow and zstandard, where shards need them."""
        suffixes = {plain_suffix(shard.name) for shard in shards}
        if PARQUET_SUFFIX in suffixes:
            library("pyarrow.parquet")
        if ARROW_SUFFIX in suffixes:
            library("pyarrow")
        if any(shard.suffix.lower() == ".zst" for shard in shards):
            library("zstandard")

    @abstractmethod
    def sample(self, row: dict[str, Any], shard: Path, kind: str) -> Sample:
        """The sample of a row. kind: of the shard, see `kind_of`. Raises DataError with its field."""

    def left_out(self, row: dict[str, Any]) -> str | None:
        """Why the row gives no sample, as a text that many rows share; None if it gives one."""
        return None

    def unread(self, row: dict[str, Any], kind: str) -> tuple[str, ...]:
        """Notes on the row's fields that `sample` does not use (`fields.unread`). May raise DataError for a bad row."""
        return ()

    def columns(self) -> tuple[str, ...] | None:
        """Columns of parquet files that are decoded; None: all."""
        return None

    def needed_columns(self) -> tuple[str, ...]:
        """One of these must be in a parquet or Arrow file: found missing before a row is read. Empty: none is asked for."""
        return ()

    def kind_of(self, table: Table, shard: Path, stop: int) -> str:
        """A property of the shard that its first rows show, for `sample`. stop: bytes of the shard. Raises DataError."""
        return ""

    def open_table(self, path: Path, shard: Path) -> Table:
        """The table in `path`, the unpacked content of `shard`."""
        return open_table(path, shard, self.columns(), self.needed_columns())

    def locate(self, path: str) -> EntryShards:
        """The entry's shards. Raises ConfigError if they have different formats, or hold the same data twice."""
        check_not_splits(Path(path).expanduser())
        shards = only_data(super().locate(path))
        self._check_one_format(shards.paths)
        return shards

    def _check_one_format(self, shards: Sequence[Path]) -> None:
        """An entry has one format: a folder often holds the same data twice, or descriptions beside the data."""
        found: dict[str, Path] = {}
        for shard in shards:
            suffix = plain_suffix(shard.name)
            found.setdefault(next((kin[0] for kin in self.same_format if suffix in kin), suffix), shard)
        if len(found) > 1:
            raise ConfigError(
                f"files of different formats ({', '.join(path.name for path in found.values())}) are named together: name those "
                "that are meant, e.g. with a glob such as FOLDER/*.parquet"
            )
        together = set(shards)
        for shard in shards:
            if shard.suffix.lower() in PACKED_SUFFIXES and shard.with_suffix("") in together:
                raise ConfigError(
                    f"{shard.name} and {shard.with_suffix('').name} are named together, and would be read twice: name one of "
                    "them, e.g. with a glob such as FOLDER/*.jsonl"
                )

    def cut(self, shard: Path, part_bytes: int) -> list[int]:
        """JSON lines at the ends of lines; all else is one part."""
        if self._is_unpacked(shard):  # by the process that scans it
            return super().cut(shard, part_bytes)
        opened = self._open(shard)
        with _naming(shard, opened.plain):
            return opened.table.cut(part_bytes)

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        """One pass over the rows."""
        return self.scan_part(shard, 0, shard.stat().st_size)

    def scan_part(self, shard: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        """The rows that begin in bytes [start, stop); of a compressed shard, all of them."""
        opened = self._open(shard)
        if self._is_unpacked(shard):
            stop = opened.stop
        with _naming(shard, opened.plain):
            if self.validate or self.filters:
                yield from self._scan_rows(opened, shard, start, stop)
            else:
                yield from self._scan_spans(opened, shard, start, stop)

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        """The row's sample."""
        _, table, plain, _, kind = self._open(shard)
        others = self._other_columns(table)
        try:
            row = table.row(offset, size)
            if self.filters and self.left_out(row) is not None:
                return
            sample = self.sample(row, shard, kind)
        except DataError as error:
            if error.file == str(plain):
                error = DataError(error.reason, field=error.field)
            raise self._located(error, table, shard, offset) from error
        except RecursionError as error:
            raise self._located(DataError(TOO_DEEP), table, shard, offset) from error
        yield replace(sample, notes=(*others, *sample.notes)) if others else sample

    def where(self, shard: Path, offset: int) -> tuple[str, str]:
        """With its line, or the row's number."""
        suffix, record = self._open(shard).table.where(offset)
        return f"{shard}{suffix}", record

    def _scan_spans(self, opened: _Opened, shard: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        table, notes = opened.table, self._first_notes(opened, start, stop)
        for offset, size, problem in table.spans(start, stop):
            if problem is None:
                yield ScannedRecord(offset=offset, size=size, num_samples=1, notes=notes.pop(offset, ()))
            else:
                yield self._bad(DataError(problem), table, shard, offset, size)

    def _first_notes(self, opened: _Opened, start: int, stop: int) -> dict[int, tuple[str, ...]]:
        """Offset -> notes on fields that are not read, of the first rows. Where rows are counted, reading gives the notes."""
        if self.is_counted:
            return {}
        others = self._other_columns(opened.table)
        notes = {}
        for offset, _, row in itertools.islice(opened.table.rows(start, stop), _LOOKED_AT):
            if isinstance(row, DataError):
                continue
            try:
                found = (*others, *self.unread(row, opened.kind))
            except (DataError, RecursionError):  # a bad row is told, or skipped, when it is read
                continue
            if found:
                notes[offset] = tuple(f"{note}{_SOME}" for note in dict.fromkeys(found))
        return notes

    def _other_columns(self, table: Table) -> tuple[str, ...]:
        """Notes on the columns that a table has and does not decode."""
        others = getattr(table, "other_columns", ())
        return tuple(unread_note(name) for name in others if name not in self.usual) if others else ()

    def _scan_rows(self, opened: _Opened, shard: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        table = opened.table
        others = self._other_columns(table)
        for offset, size, row in table.rows(start, stop):
            try:
                if isinstance(row, DataError):
                    raise row
                reason = self.left_out(row)
                if reason is not None:
                    yield ScannedRecord(offset=offset, size=size, num_samples=0, notes=(f"left out: {reason}",))
                    continue
                notes = (*others, *self.sample(row, shard, opened.kind).notes) if self.validate else ()
            except DataError as error:
                yield self._bad(error, table, shard, offset, size)
            except RecursionError:
                yield self._bad(DataError(TOO_DEEP), table, shard, offset, size)
            else:
                yield ScannedRecord(offset=offset, size=size, num_samples=1, notes=notes)

    def _bad(self, error: DataError, table: Table, shard: Path, offset: int, size: int) -> ScannedRecord:
        located = self._located(error, table, shard, offset)
        if self.config.on_bad_sample == "fail":
            raise located from error
        return ScannedRecord(offset=offset, size=size, num_samples=1, error=str(located))

    def _located(self, error: DataError, table: Table, shard: Path, offset: int) -> DataError:
        """The same error with its row."""
        suffix, record = table.where(offset)
        if error.file and error.file != str(shard):  # a file that the row names
            return DataError(
                error.reason, file=error.file, record=f"{shard}{suffix} {record}".strip(), field=error.field
            )
        return DataError(error.reason, file=f"{shard}{suffix}", record=record, field=error.field)

    def _is_unpacked(self, shard: Path) -> bool:
        """Whether the unpacked content is read instead of the shard."""
        packed = shard.suffix.lower() in PACKED_SUFFIXES
        return packed or (self.unpack_parquet and plain_suffix(shard.name) == PARQUET_SUFFIX)

    def _open(self, shard: Path) -> _Opened:
        """The shard's table, remembered until the shard changes."""
        block: dict[Path, _Opened] | None = getattr(self._block, "opened", None)
        opened = None if block is None else block.get(shard)
        if opened is None:
            opened = self._look(shard)
            if block is not None:
                block[shard] = opened
        return opened

    def _look(self, shard: Path) -> _Opened:
        stamp = Stamp.of(shard)
        with self._lock:
            opened = self._opened.get(shard)
            if opened is not None and opened.stamp == stamp:
                self._opened.move_to_end(shard)
                return opened
        cache_dir, parquet = self.config.cache_dir, plain_suffix(shard.name) == PARQUET_SUFFIX
        path = plain_file(shard, cache_dir)
        with _naming(shard, path):
            if parquet and self.unpack_parquet:
                path = arrow_file(shard, path, cache_dir, self.columns(), self.needed_columns())
                table: Table = ArrowTable(path)
            else:
                table = self.open_table(path, shard)
            stop = path.stat().st_size
            opened = _Opened(stamp, table, path, stop, self.kind_of(table, shard, stop))
        with self._lock:
            self._opened[shard] = opened
            if len(self._opened) > _MAX_OPEN:
                self._opened.popitem(last=False)
        return opened


@contextmanager
def _naming(shard: Path, plain: Path) -> Iterator[None]:
    """Errors about the unpacked content name the shard."""
    try:
        yield
    except DataError as error:
        if error.file in ("", str(plain)) and error.file != str(shard):
            raise DataError(error.reason, file=str(shard), record=error.record, field=error.field) from error
        raise
