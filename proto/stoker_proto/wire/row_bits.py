"""Some rows of a ticket, as bits: bit i of byte b is row 8 * b + i of the ticket's rows.

rows 0, 3 and 9 of 12   ->   09 02
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import LocalProtocolError

MAX_CHOSEN = 2048
"""Largest count of a ticket that wants some of its rows only: a TICKET frame is short."""


def pack_rows(rows: NDArray[np.int64], count: int) -> bytes:
    """The bits of the rows int64[n], each from 0 to count - 1, for a ticket of `count` rows."""
    wanted = np.zeros(count, np.uint8)
    wanted[rows] = 1
    return np.packbits(wanted, bitorder="little").tobytes()


def unpack_rows(bits: bytes, count: int) -> NDArray[np.int64]:
    """int64[n]: the rows, ascending. Raises LocalProtocolError for bits that no ticket of `count` rows may have."""
    if not 0 < count <= MAX_CHOSEN or len(bits) != -(-count // 8):
        raise LocalProtocolError(
            f"{len(bits)} bytes of chosen rows for {count} rows: one bit for each, and at most {MAX_CHOSEN} of them"
        )
    rows = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"))
    if not len(rows) or rows[-1] >= count:
        raise LocalProtocolError(f"chosen rows {rows[:8].tolist()} of {count}: at least one, and none past the last")
    return rows.astype(np.int64)
