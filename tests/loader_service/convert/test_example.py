"""The protocol-buffer reader on bytes worked out by hand, and on what hostile records can hold."""

from __future__ import annotations

import numpy as np
import pytest

from loader_service.convert.example import parse_example
from loader_service.convert.images import decode_image
from stoker_proto.errors import DataError
from tests.loader_service.convert.makers import example, message, varint


def test_an_example_byte_by_byte() -> None:
    """features { feature { key: "a" value { int64_list { value: [1, 300, -1] } } } }"""
    data = bytes.fromhex("0a18 0a16 0a01 61 1211 1a0f 0a0d 01 ac02 ffffffffffffffffff01".replace(" ", ""))
    assert parse_example(data)["a"].numbers().tolist() == [1, 300, -1]


def test_lists_may_be_packed_or_not() -> None:
    floats = b"".join(b"\x0d" + np.float32(v).tobytes() for v in (0.5, -2.0))  # wire type 5
    numbers = b"".join(b"\x08" + varint(v) for v in (7, 1 << 40))  # wire type 0
    data = message(
        1,
        message(1, message(1, b"f") + message(2, message(2, floats)))
        + message(1, message(1, b"n") + message(2, message(3, numbers)))
        + message(1, message(2, b"") + message(1, b"empty")),
    )
    found = parse_example(data)
    assert found["f"].numbers().tolist() == [0.5, -2.0]
    assert found["n"].numbers().tolist() == [7, 1 << 40]
    assert (found["empty"].kind, found["empty"].numbers().tolist(), found["empty"].bytes_values()) == (
        "nothing",
        [],
        [],
    )


def test_unknown_fields_are_stepped_over() -> None:
    data = varint(9 << 3) + varint(5) + varint(10 << 3 | 1) + b"8 bytes." + example({"a": [b"x"]}) + message(15, b"new")
    assert [bytes(value) for value in parse_example(data)["a"].bytes_values()] == [b"x"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no feature at all"),
        (b"\x0a\x05abc", "field 1 of 5 bytes where 3 are left"),
        (b"\x0a" + b"\xff" * 11, "a number without an end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "bytes where 0 are left"),
        (b"\x0b\x01", "wire type 3"),
        (b"\x08\x01", "field 1 has wire type 0"),
        (message(1, message(1, message(1, b"\xff\xfe"))), "a feature's name is not UTF-8"),
    ],
)
def test_damaged_records(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_example(data)


def test_damaged_lists_are_found_when_they_are_asked_for() -> None:
    data = message(1, message(1, message(1, b"f") + message(2, message(2, message(1, b"12345")))))
    with pytest.raises(DataError, match="5 bytes of floats"):
        parse_example(data)["f"].numbers()


def test_every_cut_and_every_flipped_bit_is_an_error_or_a_value() -> None:
    whole = example({"steps/action": np.arange(6.0), "t": [b"text"], "n": [1, 2, 3]})

    def values(data: bytes) -> int | str:
        """How many there are, or what is wrong."""
        try:
            features = parse_example(data).values()
            return sum(len(one.bytes_values() if one.kind == "bytes" else one.numbers()) for one in features)
        except DataError as error:
            return str(error)

    assert values(whole) == 10
    cut = [values(whole[:size]) for size in range(1, len(whole))]
    assert all(isinstance(found, str) for found in cut)
    flipped = [
        values(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :]) for i in range(len(whole)) for bit in range(8)
    ]
    assert {type(found) for found in flipped} == {int, str}


@pytest.mark.long
def test_images_of_a_claimed_size_are_refused_before_they_are_decoded() -> None:
    huge = b"\x89PNG\r\n\x1a\n" + bytes.fromhex("0000000d49484452000186a0000186a00802000000")
    huge += bytes.fromhex("00000000")  # 100,000 x 100,000
    with pytest.raises(DataError, match="an image"):
        decode_image(huge)
    with pytest.raises(DataError, match="an encoded image of 0 bytes"):
        decode_image(b"")
