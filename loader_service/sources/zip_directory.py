"""The central directory of a ZIP archive: its members, with every number checked.

    local header, data, local header, data, ..., entry, entry, ..., end record [comment]

Only what NPZ writers make is read: one file, below 4 GiB, with the directory right before the end record. One `pread` of the
last KB is enough for the usual archive.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from stoker_proto.errors import DataError

Read = Callable[[int, int], bytes]
"""(offset, size) -> exactly these bytes of the file, or DataError."""

_MAX_BYTES = 16 << 20
_END = struct.Struct("<4s4H2LH")  # end record: 22 bytes, then the comment
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


def read_directory(read: Read, file_size: int) -> dict[str, Member]:
    """Members by name, without `.npy`. Raises DataError for what is no whole archive, and for a name that is there twice."""
    if file_size == 0:
        raise DataError("it is empty (0 bytes): copy it again")
    tail_start, tail, end = _find_end(read, file_size)
    _, disk, directory_disk, here, count, size, offset, _ = _END.unpack_from(tail, end)
    if disk or directory_disk or here != count or 0xFFFFFFFF in (size, offset) or count == 0xFFFF:
        raise DataError("an archive in several parts or of 4 GiB and more is not read: write smaller files")
    if offset + size != tail_start + end or size > _MAX_BYTES:
        raise DataError("its directory does not lie where it should: the file is damaged; copy it again")
    directory = tail[offset - tail_start : end] if offset >= tail_start else read(offset, size)
    members: dict[str, Member] = {}
    position = 0
    for _ in range(count):
        position, member = _read_entry(directory, position)
        name = member.name.decode("utf-8", "replace").removesuffix(".npy")
        if name in members:
            raise DataError("two members of this name: which one is meant cannot be known", field=name)
        members[name] = member
    if position != len(directory):
        raise DataError("its directory holds more than it says: the file is damaged; copy it again")
    return members


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
    head = read(0, min(file_size, 16))
    if head.startswith(b"PK"):
        raise DataError(f"its end is missing: the file was cut short at {file_size} bytes; copy it again")
    raise DataError(f"not an NPZ (a ZIP archive): it begins with {head!r}; copy or record it again")


def _read_entry(directory: bytes, position: int) -> tuple[int, Member]:
    if len(directory) - position < _ENTRY.size or directory[position : position + 4] != b"PK\1\2":
        raise DataError("its directory is damaged; copy it again")
    fields = _ENTRY.unpack_from(directory, position)
    flags, method = fields[3], fields[4]
    crc, compressed_size, size, name_length, extra_length, comment_length = fields[7:13]
    start = position + _ENTRY.size
    name = directory[start : start + name_length]
    end = start + name_length + extra_length + comment_length
    return end, Member(name, flags, method, crc, compressed_size, size, fields[16])
