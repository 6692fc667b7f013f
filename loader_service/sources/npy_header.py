"""The header of a .npy member: magic, version, length, and the text of a Python dictionary.

    93 'NUMPY' 1 0 u16:118 "{'descr': '|u1', 'fortran_order': False, 'shape': (50, 256, 256, 3), }" spaces newline

The text is matched against the few forms of a plain array's header, and never evaluated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from stoker_proto.errors import DataError

MAX_HEADER_BYTES = 1024
"""Plain arrays need 128; a longer header is refused."""

_ITEM = re.compile(
    rb"""\s*['"](?P<key>descr|fortran_order|shape)['"]\s*:\s*
    (?:['"](?P<text>[<>|=]?[A-Za-z][0-9]{0,9})['"]|(?P<bool>True|False)|\((?P<shape>[0-9,\s]{0,400})\))\s*,?""",
    re.VERBOSE,
)
_KINDS = frozenset("biufc")  # plain numbers; O is a pickle, V a structure


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """What follows the header: an array in C order."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size_bytes: int
    """Bytes of the header: the array begins behind it."""


def parse_npy_header(head: bytes) -> NpyHeader:
    """The header at the beginning of `head`. Raises DataError for what is no plain array of numbers in C order."""
    if len(head) < 12 or head[:6] != b"\x93NUMPY":
        raise DataError(f"not a .npy array: it begins with {head[:8]!r}")
    if head[6] == 1:
        start, length = 10, int.from_bytes(head[8:10], "little")
    elif head[6] in (2, 3):
        start, length = 12, int.from_bytes(head[8:12], "little")
    else:
        raise DataError(f".npy format version {head[6]}: 1, 2 and 3 are read")
    if start + length > min(len(head), MAX_HEADER_BYTES):
        raise DataError(f"a .npy header of {length} bytes: plain arrays need less than {MAX_HEADER_BYTES}")
    dtype, shape = _parse_fields(head[start : start + length])
    return NpyHeader(dtype, shape, start + length)


@lru_cache(maxsize=1024)  # trajectories of one length share their header
def _parse_fields(text: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    inner = text.strip()
    damaged = DataError(f"a .npy header that is no plain array's: {text[:100]!r}")
    if not (inner.startswith(b"{") and inner.endswith(b"}")):
        raise damaged
    found: dict[bytes, re.Match[bytes]] = {}
    position, end = 1, len(inner) - 1
    while inner[position:end].strip():
        match = _ITEM.match(inner, position, end)
        if match is None or match["key"] in found:
            raise damaged
        found[match["key"]] = match
        position = match.end()
    if set(found) != {b"descr", b"fortran_order", b"shape"}:
        raise damaged
    descr, order, shape = found[b"descr"]["text"], found[b"fortran_order"]["bool"], found[b"shape"]["shape"]
    if descr is None or order is None or shape is None:
        raise damaged
    if descr.lstrip(b"<>|=")[:1] == b"O":
        raise DataError("it holds pickled Python objects, which are never loaded: write plain numbers")
    if order != b"False":
        raise DataError("Fortran order: write it with np.ascontiguousarray")
    try:
        dtype = np.dtype(descr.decode("ascii"))
    except (TypeError, ValueError):
        raise damaged from None
    if dtype.kind not in _KINDS:
        raise DataError(f"dtype {dtype}: plain numbers are expected")
    sizes = [part.strip() for part in shape.split(b",")]
    if sizes and not sizes[-1]:
        sizes.pop()
    if len(sizes) > 32 or not all(size.isdigit() and len(size) <= 18 for size in sizes):
        raise damaged
    return dtype, tuple(int(size) for size in sizes)
