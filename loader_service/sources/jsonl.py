"""Lines of a JSONL file by byte offset.

    {"obs_path": "traj_000123/obs.npz", ...}      offset 0, size 40 (without the newline)
    {"obs_path": "traj_000124/obs.npz", ...}      offset 41

A file is scanned in parts by several processes; single lines are read back in any order.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from loader_service.sources.record_numbers import MARK_BYTES, Mark, record_number
from stoker_proto.errors import DataError
from stoker_proto.host.trouble import check_host

MAX_LINE_BYTES = 256 << 20
"""A longer line is rejected: it is no record, and it would have to be held in memory."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Byte-order mark of UTF-8, which some editors write at the start of a file. It is no part of the content."""

_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a compressed file -> by what."""
_MAGIC_BYTES = max(map(len, _PACKED))
_MOST_HELD = 64
_files = threading.local()


def cut_lines(shard: Path, part_bytes: int) -> list[int]:
    """Offsets [0, ..., size] that cut the file into parts of about `part_bytes`, each made of whole lines."""
    size = shard.stat().st_size
    cuts = [0]
    with shard.open("rb") as file:
        head = file.read(_MAGIC_BYTES)
        for magic, name in _PACKED.items():
            if head.startswith(magic):
                raise DataError(
                    f"it is {name}-compressed, and lines are read by their place: unpack it", file=str(shard)
                )
        for target in range(part_bytes, size, part_bytes):
            if target <= cuts[-1]:  # inside a long line that a part has taken whole
                continue
            file.seek(target - 1)  # a newline there ends the line before `target`
            _read_line(file, shard, target - 1)
            if cuts[-1] < file.tell() < size:
                cuts.append(file.tell())
    cuts.append(size)
    return cuts


def iter_lines(shard: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its newline) of the lines that begin in bytes [start, stop); blank lines are left out, and so is
    a byte-order mark."""
    with shard.open("rb", buffering=1 << 20) as file:
        file.seek(start)
        offset = start
        while stop is None or offset < stop:
            line = _read_line(file, shard, offset)
            if not line:
                return
            text = line.rstrip(b"\r\n")
            skip = len(BYTE_ORDER_MARK) if offset == 0 and text.startswith(BYTE_ORDER_MARK) else 0
            text = text[skip:]
            if text.strip():
                yield offset + skip, text
            offset += len(line)


@contextmanager
def held_open() -> Iterator[None]:
    """Files that `read_line` opens in this thread stay open until the end of the block (the first 64)."""
    outer, _files.held = getattr(_files, "held", None), {}
    try:
        yield
    finally:
        held, _files.held = _files.held, outer
        for descriptor in held.values():
            os.close(descriptor)


def read_line(shard: Path, offset: int, size: int) -> bytes:
    """The line at [offset, offset + size), as the scan found it."""
    held: dict[Path, int] | None = getattr(_files, "held", None)
    descriptor = None if held is None else held.get(shard)
    is_held = descriptor is not None
    if descriptor is None:
        try:
            descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            check_host(error, str(shard))
            raise DataError(f"the shard cannot be read ({error.strerror})", file=str(shard)) from error
        if held is not None and len(held) < _MOST_HELD:
            held[shard] = descriptor
            is_held = True
    try:
        line = os.pread(descriptor, size, offset)
    except OSError as error:
        check_host(error, str(shard))
        raise DataError(f"bytes at {offset} cannot be read ({error.strerror})", file=str(shard)) from error
    finally:
        if not is_held:
            os.close(descriptor)
    if len(line) != size:
        raise DataError(
            f"it ends before byte {offset + size}: it changed since it was scanned; run loader-prepare again",
            file=str(shard),
        )
    return line


def line_number(shard: Path, offset: int) -> int:
    """Number (from 1) of the line that begins at `offset`. Reads the file up to it, once: use it for error messages only."""
    return record_number(shard, offset, 1, _walk_lines)


def _walk_lines(shard: Path, mark: Mark, offset: int) -> Iterator[Mark]:
    position, number = mark
    with shard.open("rb", buffering=0) as file:
        file.seek(position)
        while position < offset:
            block = file.read(min(offset - position, MARK_BYTES))
            if not block:
                return
            number += block.count(b"\n")
            position += len(block)
            yield Mark(position, number)


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line. NaN and Infinity, which JSON does not have, are accepted: a later check names them."""
    try:
        row = orjson.loads(line)
    except ValueError as error:
        row = _parse_leniently(line, error)
    if not isinstance(row, dict):
        raise DataError(f"a JSON object is expected, not {type(row).__name__}")
    return row


def _parse_leniently(line: bytes, strict_error: ValueError) -> Any:
    reason = f"unreadable JSON ({strict_error}): correct or remove the line"
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(reason) from error


def _read_line(file: Any, shard: Path, offset: int) -> bytes:
    line: bytes = file.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"a line of more than {MAX_LINE_BYTES} bytes begins near byte {offset}: one JSON object per line is expected",
            file=str(shard),
        )
    return line
