"""TFRecord files without TensorFlow: the framing.

    uint64 length | uint32 masked CRC-32C of the length | length bytes | uint32 masked CRC-32C of the bytes

All little-endian; masked means rotated right by 15 bits plus 0xa282ead8, so that a CRC of data with CRCs in it stays useful.
Source: tensorflow `core/lib/io/record_writer.h`, `core/lib/hash/crc32c.h`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader_service.sources.lfs import refuse_pointer
from stoker_proto.errors import ConfigError, DataError

MAX_RECORD_BYTES = 2 << 30
"""Protocol buffers end there."""
_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")


def scan_records(path: Path) -> Iterator[tuple[int, int]]:
    """(offset of the frame, bytes of the record) of every record; only the headers are read. Raises DataError."""
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            offset = 0
            while offset < size:
                file.seek(offset)
                length = _length(file.read(_HEADER.size), offset, size, path)
                yield offset, length
                offset += _HEADER.size + length + _FOOTER.size
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})", file=str(path)) from error


def read_record(path: Path, offset: int) -> bytes:
    """The record whose frame begins at `offset`, both checksums compared. Raises DataError."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            length = _length(file.read(_HEADER.size), offset, os.fstat(file.fileno()).st_size, path)
            data, footer = file.read(length), file.read(_FOOTER.size)
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})", file=str(path)) from error
    if len(data) != length or len(footer) != _FOOTER.size:
        raise DataError("it ends in the middle of a record: copy it again", file=str(path), record=f"at byte {offset}")
    if _FOOTER.unpack(footer)[0] != masked_crc(data):
        raise DataError(
            "the checksum of a record is wrong: copy the file again", file=str(path), record=f"at byte {offset}"
        )
    return data


def masked_crc(data: bytes) -> int:
    """The masked CRC-32C."""
    crc: int = _crc32c().crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _length(header: bytes, offset: int, size: int, path: Path) -> int:
    """Bytes of the record with this header, which fits into the file."""
    where = f"at byte {offset}"
    if len(header) < _HEADER.size:
        raise DataError("it ends in the middle of a record's header: copy it again", file=str(path), record=where)
    length, crc = _HEADER.unpack(header)
    if crc != masked_crc(header[:8]):
        raise DataError(
            "the checksum of a record's length is wrong: it is no TFRecord file, or damaged (compressed ones are not read)",
            file=str(path),
            record=where,
        )
    if length > MAX_RECORD_BYTES:
        raise DataError(f"a record of {length} bytes: at most {MAX_RECORD_BYTES}", file=str(path), record=where)
    if offset + _HEADER.size + length + _FOOTER.size > size:
        raise DataError("it ends in the middle of a record: copy it again", file=str(path), record=where)
    return int(length)


def _crc32c() -> Any:
    try:
        import crc32c
    except ImportError as error:
        raise ConfigError("TFRecord files need crc32c: pip install 'stoker[convert]'") from error
    return crc32c
