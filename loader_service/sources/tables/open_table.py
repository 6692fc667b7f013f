"""Which kind of table a file is, by its suffix and its first bytes.

    name                     first byte     table
    a.jsonl a.ndjson a.json  {              one JSON object per line
    a.jsonl a.ndjson a.json  [              one JSON array of objects
    a.parquet                PAR1           parquet
    a.arrow                  ARROW1, ...    Arrow, as the datasets library writes it

Each also as .gz or .zst (`unpack`).
"""

from __future__ import annotations

from pathlib import Path

from loader_service.sources.jsonl import BYTE_ORDER_MARK
from loader_service.sources.tables.arrow import ArrowTable
from loader_service.sources.tables.json_table import JsonArray, JsonLines
from loader_service.sources.tables.parquet import ParquetTable
from loader_service.sources.tables.table import ARROW_SUFFIX, JSON_SUFFIXES, PARQUET_SUFFIX, Table, plain_suffix
from stoker_proto.errors import DataError
from stoker_proto.host.trouble import check_host

_HEAD_BYTES = 64 << 10
_MAGICS = {
    b"\x1f\x8b": "gzip-compressed: call it NAME.gz",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: call it NAME.zst",
    b"PAR1": "parquet: call it NAME.parquet",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
}


def open_table(path: Path, shard: Path, columns: tuple[str, ...] | None, needed: tuple[str, ...] = ()) -> Table:
    """The table in `path`, the unpacked content of `shard`; columns, needed: see `ParquetTable`. Raises DataError."""
    head = _read_head(path)
    for magic, found in _MAGICS.items():
        if head.startswith(magic) and (magic, plain_suffix(shard.name)) != (b"PAR1", PARQUET_SUFFIX):
            raise DataError(f"it is {found}", file=str(shard))
    suffix = plain_suffix(shard.name)
    if suffix == PARQUET_SUFFIX:
        return ParquetTable(path, columns, needed)
    if suffix == ARROW_SUFFIX:
        return ArrowTable(path, columns, needed)
    if suffix not in JSON_SUFFIXES:
        known = ", ".join((*JSON_SUFFIXES, PARQUET_SUFFIX, ARROW_SUFFIX))
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
