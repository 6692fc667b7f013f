"""Where the images of a PIECE lie in its frame, so that nobody has to copy them.

    8d | a6 "ticket" 07 | a6 "loader" a2 "ab" | a4 "keys" c4 18 ... | a6 "images" 92 c4 03 xx xx xx c4 02 yy yy | ...
                                                                begin ^           ^ image   end ^

Only what a PIECE has before its images is understood: small numbers, strings and binaries. Other bytes are left to msgpack, which
accepts or rejects them.
"""

from __future__ import annotations

import struct

_IMAGES = b"\xa6images"
_MAX_IMAGES = 1 << 16  # a view takes 184 bytes; more images are left to msgpack's own limits
_MAX_BEFORE = 16  # fields; a PIECE has fewer
_WIDTHS = {
    0xC4: 1,
    0xC5: 2,
    0xC6: 4,
    0xD9: 1,
    0xDA: 2,
    0xDB: 4,
}  # bin and str of 8, 16 and 32 bits: bytes of their length
UINT_BYTES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
"""First byte of an unsigned number in msgpack -> bytes of the number behind it."""
_FORMATS = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}


def find_images(body: memoryview) -> tuple[int, int, list[bytes | memoryview]] | None:
    """(begin, end, images) of the array of binaries that is the value of the body's field `images`.

    body: the msgpack map of a PIECE. Returns None where it is not understood. Never reads outside the body, and makes a bounded
    number of objects.
    """
    try:
        at = _find_array(body)
        return None if at is None else _views(body, at)
    except (IndexError, struct.error):  # cut short
        return None


def _find_array(body: memoryview) -> int | None:
    """Where the value of `images` begins."""
    if body[0] >> 4 != 0x8 and body[0] != 0xDE:
        return None
    at = 1 if body[0] != 0xDE else 3
    for _ in range(_MAX_BEFORE):
        if body[at : at + len(_IMAGES)] == _IMAGES:
            return at + len(_IMAGES)
        for _ in range(2):  # a name and its value
            end = _end_of(body, at)
            if end is None:
                return None
            at = end
    return None


def _end_of(body: memoryview, at: int) -> int | None:
    """Where a number, string or binary ends; None for anything else."""
    kind = body[at]
    if kind < 0x80:
        return at + 1
    if kind >> 5 == 0b101:
        return at + 1 + (kind & 31)
    if kind in UINT_BYTES:
        return at + 1 + UINT_BYTES[kind]
    width = _WIDTHS.get(kind)
    if width is None:
        return None
    (size,) = _FORMATS[width].unpack_from(body, at + 1)
    return at + 1 + width + int(size)


def _views(body: memoryview, begin: int) -> tuple[int, int, list[bytes | memoryview]] | None:
    """The array that begins there, if all its items are binaries that lie within the body."""
    kind, at = body[begin], begin + 1
    if kind >> 4 == 0x9:
        count = kind & 15
    elif kind in (0xDC, 0xDD):
        width = 2 if kind == 0xDC else 4
        (count,) = _FORMATS[width].unpack_from(body, at)
        at += width
    else:
        return None
    if count > _MAX_IMAGES:
        return None
    images: list[bytes | memoryview] = []
    for _ in range(count):
        width = _WIDTHS.get(body[at], 0) if body[at] < 0xD9 else 0
        if not width:
            return None
        (size,) = _FORMATS[width].unpack_from(body, at + 1)
        at += 1 + width
        if at + size > len(body):
            return None
        images.append(body[at : at + size])
        at += size
    return begin, at, images
