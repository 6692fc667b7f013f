"""What is known of the files that a record only names (NPZ, videos), without reading their pixels.

A shard's bytes do not tell the pixels of the NPZ files or videos beside it. So the scan keeps, for each record, a fingerprint of
what these files say of themselves in a few bytes: sizes and CRCs. Loaders compare it, and `read` compares it again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from stoker_proto.errors import DataError
from stoker_proto.host.trouble import check_host

_MAX_BOXES = 4096
_MAX_HEADER_BYTES = 16 << 20
_BOX = struct.Struct(">L4s")  # ISO/IEC 14496-12, 4.2: size and type; size 1: a 64-bit size follows; 0: up to the end


class NamedFiles(NamedTuple):
    """The files of one record."""

    content: int
    """Fingerprint of sizes and CRCs, or of headers; 1 <= content < 2**63. Equal on each host for equal files."""
    changed_ns: int = 0
    """Time of the last change, in ns; 0: not compared. Never compared between hosts."""


UNREADABLE = NamedFiles(1)
"""Files that the scan could not open. `read` gives the error."""


def content_of(parts: Iterable[bytes]) -> int:
    """Fingerprint of 63 bits. Raises nothing; equal parts give an equal number."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") >> 1 or 2


def video_content(path: str) -> int:
    """Fingerprint of an mp4's size and header: the sizes of its boxes, and all of `moov`, which lists the size of each frame.

    A file is read again only when its size, time or inode changes. Raises DataError.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - called for each episode
        return _video_content(path, status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        check_host(error, path)
        raise DataError(f"the video cannot be read ({error.strerror})", file=path) from error


@lru_cache(maxsize=4096)
def _video_content(path: str, size: int, _changed_ns: int, _inode: int) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block the loader
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DataError("not a file: a video is expected", file=path)
        return content_of(_header(descriptor, size))
    finally:
        os.close(descriptor)


def _header(descriptor: int, file_size: int) -> Iterable[bytes]:
    yield file_size.to_bytes(8, "little")
    position = 0
    for _ in range(_MAX_BOXES):
        head = os.pread(descriptor, 16, position)
        yield head
        if len(head) < 16:
            return
        size, kind = _BOX.unpack_from(head)
        size = int.from_bytes(head[8:], "big") if size == 1 else size or file_size - position
        if kind == b"moov":
            yield os.pread(descriptor, min(size, _MAX_HEADER_BYTES), position)
        if size < 8:
            return  # no mp4: the decoder says so
        position += size
