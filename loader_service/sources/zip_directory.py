"""The central directory of a ZIP archive: its members, with every number checked.

    local header, data, local header, data, ..., entry, entry, ..., end record [comment]

Only what NPZ writers make is read: one file, with the directory right before the end records. One `pread` of the last KB is
enough for the usual archive. Some writers use the records of zip64 for small archives too: they are read where a number says so.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from stoker_proto.errors import DataError
from stoker_proto.host import lfs

Read = Callable[[int, int], bytes]
"""(offset, size) -> exactly these bytes of the file, or DataError."""

_MAX_BYTES = 16 << 20
_END = struct.Struct("<4s4H2LH")  # end record: 22 bytes, then the comment
_END64 = struct.Struct("<4sQ2H2L4Q")  # zip64 end record: 56 bytes
_LOCATOR64 = struct.Struct("<4sLQL")  # 20 bytes, between the zip64 end record and the end record
_ENTRY = struct.Struct("<4s6H3L5H2L")  # entry: 46 bytes, then name, extra, comment
_LOCAL = struct.Struct("<4s5H3L2H")  # local header: 30 bytes, then name, extra, data


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of the directory."""

    name: bytes
    flags: int
    method: int
    crc: int
    compressed_size: int
    size: int
    header_offset: int
    is_twice: bool = False
    """Two members have this name: which one is meant cannot be known. Sizes and CRC stand for both, and nothing can be read."""


def read_directory(read: Read, file_size: int) -> dict[str, Member]:
    """Members by name, without `.npy`. Raises DataError for what is no whole archive."""
    if file_size == 0:
        raise DataError("it is empty (0 bytes): copy it again")
    tail_start, tail, end = _find_end(read, file_size)
    _, disk, directory_disk, here, count, size, offset, _ = _END.unpack_from(tail, end)
    directory_end = tail_start + end
    has_locator = tail[max(end - _LOCATOR64.size, 0) :].startswith(b"PK\6\7")
    if has_locator or 0xFFFFFFFF in (size, offset) or 0xFFFF in (disk, directory_disk, here, count):
        directory_end, disk, directory_disk, here, count, size, offset = _read_end64(read, directory_end)
    if disk or directory_disk or here != count:
        raise DataError("an archive in several parts is not read: write one file")
    if offset + size != directory_end or size > _MAX_BYTES:
        raise DataError("its directory does not lie where it should: the file is damaged; copy it again")
    directory = tail[offset - tail_start : directory_end - tail_start] if offset >= tail_start else read(offset, size)
    members: dict[str, Member] = {}
    position = 0
    for _ in range(count):
        position, member = _read_entry(directory, position)
        name = member.name.decode("utf-8", "replace").removesuffix(".npy")
        members[name] = member if name not in members else _twice(members[name], member)
    if position != len(directory):
        raise DataError("its directory holds more than it says: the file is damaged; copy it again")
    return members


def _twice(first: Member, second: Member) -> Member:
    return replace(
        first,
        crc=zlib.crc32(first.crc.to_bytes(4, "little") + second.crc.to_bytes(4, "little")),
        size=first.size + second.size,
        is_twice=True,
    )


def data_offset(read: Read, file_size: int, member: Member) -> int:
    """Where the member's bytes begin: behind the LOCAL header, whose extra field differs from the directory's."""
    header = read(member.header_offset, _LOCAL.size + len(member.name))
    fields = _LOCAL.unpack_from(header)
    if fields[0] != b"PK\3\4" or header[_LOCAL.size :] != member.name or fields[3] != member.method:
        raise DataError("its local header contradicts the directory: the file is damaged; copy it again")
    offset = member.header_offset + _LOCAL.size + int(fields[-2]) + int(fields[-1])
    if offset + member.compressed_size > file_size:
        raise DataError("it ends too early: the file is cut short; copy it again")
    return offset


def _find_end(read: Read, file_size: int) -> tuple[int, bytes, int]:
    """(file offset of the tail, the tail's bytes, position of the end record in it)."""
    for length in (1024, _END.size + 0xFFFF):  # without and with a comment of any length
        start = max(0, file_size - length)
        tail = read(start, file_size - start)
        end = tail.rfind(b"PK\5\6")
        if 0 <= end <= len(tail) - _END.size and end + _END.size + _END.unpack_from(tail, end)[-1] == len(tail):
            return start, tail, end
    head = read(0, min(file_size, len(lfs.MAGIC)))
    if lfs.is_pointer(head):
        raise DataError(lfs.REASON)
    if head.startswith(b"PK"):
        raise DataError(f"its end is missing: the file was cut short at {file_size} bytes; copy it again")
    raise DataError(f"not an NPZ (a ZIP archive): it begins with {head[:16]!r}; copy or record it again")


def _read_end64(read: Read, end: int) -> tuple[int, ...]:
    """The zip64 end record before the end record at `end`: its own offset, then the fields that the end record has too."""
    damaged = DataError("its zip64 end record does not lie where it should: the file is damaged; copy it again")
    start = end - _LOCATOR64.size
    if start < _END64.size:
        raise damaged
    magic, _, offset, _ = _LOCATOR64.unpack(read(start, _LOCATOR64.size))
    if magic != b"PK\6\7" or not 0 <= offset <= start - _END64.size:
        raise damaged
    magic, size, _, _, disk, directory_disk, here, count, directory_size, directory_offset = _END64.unpack(
        read(offset, _END64.size)
    )
    if magic != b"PK\6\6" or offset + 12 + size != start:
        raise damaged
    return offset, disk, directory_disk, here, count, directory_size, directory_offset


def _wide(extra: bytes, numbers: tuple[int, ...]) -> list[int]:
    """(size, compressed size, offset) with those that do not fit 32 bits from the entry's extra field 1."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        field = extra[position + 4 : position + 4 + length]
        if kind == 1:
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            return [next(wide, number) if number == 0xFFFFFFFF else number for number in numbers]
        position += 4 + length
    return list(numbers)


def _read_entry(directory: bytes, position: int) -> tuple[int, Member]:
    if len(directory) - position < _ENTRY.size or directory[position : position + 4] != b"PK\1\2":
        raise DataError("its directory is damaged; copy it again")
    fields = _ENTRY.unpack_from(directory, position)
    flags, method = fields[3], fields[4]
    crc, compressed_size, size, name_length, extra_length, comment_length = fields[7:13]
    start = position + _ENTRY.size
    name = directory[start : start + name_length]
    end = start + name_length + extra_length + comment_length
    header_offset = fields[16]
    if 0xFFFFFFFF in (size, compressed_size, header_offset):
        extra = directory[start + name_length : start + name_length + extra_length]
        size, compressed_size, header_offset = _wide(extra, (size, compressed_size, header_offset))
        if max(size, compressed_size, header_offset) >= 1 << 62:  # beyond every file
            raise DataError("its directory is damaged; copy it again")
    return end, Member(name, flags, method, crc, compressed_size, size, header_offset)
