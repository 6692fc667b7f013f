"""Which rows of a ticket are wanted, as bits."""

from __future__ import annotations

import numpy as np
import pytest

from stoker_proto.errors import LocalProtocolError
from stoker_proto.wire.messages import Ticket
from stoker_proto.wire.row_bits import pack_rows, unpack_rows


def test_rows_are_bits() -> None:
    bits = pack_rows(np.array([0, 3, 9]), 12)
    assert bits == b"\x09\x02"
    assert unpack_rows(bits, 12).tolist() == [0, 3, 9]
    assert Ticket(ticket=1, split="train", epoch=0, lane=0, start=5, count=12, rows=bits).num_rows == 3
    assert Ticket(ticket=1, split="train", epoch=0, lane=0, start=5, count=12).num_rows == 12


@pytest.mark.parametrize(
    ("bits", "count"),
    [(b"\x01", 12), (b"\x01\x00\x00", 12), (b"\x00\x00", 12), (b"\x00\x10", 12), (b"\xff" * 257, 2049), (b"", 0)],
)
def test_bits_that_no_such_ticket_has_are_refused(bits: bytes, count: int) -> None:
    with pytest.raises(LocalProtocolError, match="chosen rows"):
        unpack_rows(bits, count)
