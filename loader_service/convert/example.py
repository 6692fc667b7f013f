"""tf.train.Example and SequenceExample without TensorFlow: as much of the protocol-buffer wire format as they use.

    Example { Features { map<string, Feature> } }                     field 1
    SequenceExample { Features, FeatureLists { map<string, FeatureList { repeated Feature }> } }     fields 1 and 2
    Feature { BytesList 1 | FloatList 2 | Int64List 3 }, each a list in its field 1

Values are decoded only when they are requested. Every length is compared with the bytes that are there. Nothing nests deeper than
the six levels above.
Source: tensorflow `core/example/{example,feature}.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import DataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KINDS = {1: "bytes", 2: "floats", 3: "whole numbers"}
# What a message may have: (field number, wire type).
_FIRST = frozenset({(1, _BYTES)})
_BOTH = _FIRST | {(2, _BYTES)}
_ANY_KIND = _BOTH | {(3, _BYTES)}
_LIST_OR_FLOAT, _LIST_OR_VARINT = _FIRST | {(1, _FIXED32)}, _FIRST | {(1, _VARINT)}
MAX_FEATURES = 65_536
MAX_VALUES = 1 << 26


@dataclass(frozen=True, slots=True)
class Feature:
    """The values under one name; those of a FeatureList follow each other."""

    lists: tuple[tuple[int, memoryview], ...]
    """(kind, its undecoded list)."""

    @property
    def kind(self) -> str:
        """What it holds, in words; "nothing" for an empty one."""
        kinds = {kind for kind, _ in self.lists}
        return " and ".join(_KINDS[kind] for kind in sorted(kinds)) or "nothing"

    def bytes_values(self) -> list[memoryview]:
        """Raises DataError if it holds something else."""
        self._only(1)
        found = [value for _, data in self.lists for _, value in _fields(data, _FIRST)]
        return [value for value in found if isinstance(value, memoryview)]

    def numbers(self) -> NDArray[np.float64]:
        """float64[n] of floats (exact) or whole numbers. Raises DataError if it holds something else."""
        self._only(2, 3)
        parts = [_floats(data) if kind == 2 else _integers(data) for kind, data in self.lists]
        return np.concatenate(parts) if parts else np.empty(0)

    def _only(self, *kinds: int) -> None:
        if any(kind not in kinds for kind, _ in self.lists):
            raise DataError(f"it holds {self.kind}, not {' or '.join(_KINDS[kind] for kind in kinds)}")


def parse_example(data: bytes) -> dict[str, Feature]:
    """Name -> feature of an Example or a SequenceExample. Raises DataError."""
    found: dict[str, Feature] = {}
    for number, message in _fields(memoryview(data), _BOTH):
        for _, entry in _fields(_view(message), _FIRST):
            name, value = _entry(_view(entry))
            if len(found) >= MAX_FEATURES:
                raise DataError(f"more than {MAX_FEATURES} features")
            found[name] = Feature(_lists(value) if number == 1 else _lists_of_list(value))
    if not found:
        raise DataError("no feature at all: it is no tf.train.Example")
    return found


def _entry(data: memoryview) -> tuple[str, memoryview]:
    """Key and value of a map's entry."""
    name, value = "", memoryview(b"")
    for number, part in _fields(data, _BOTH):
        if number == 2:
            value = _view(part)
        else:
            try:
                name = bytes(_view(part)).decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError("a feature's name is not UTF-8: the record is damaged") from error
    return name, value


def _lists(feature: memoryview) -> tuple[tuple[int, memoryview], ...]:
    return tuple((number, _view(part)) for number, part in _fields(feature, _ANY_KIND))


def _lists_of_list(feature_list: memoryview) -> tuple[tuple[int, memoryview], ...]:
    return tuple(one for _, part in _fields(feature_list, _FIRST) for one in _lists(_view(part)))


def _floats(data: memoryview) -> NDArray[np.float64]:
    parts = []
    for _, value in _fields(data, _LIST_OR_FLOAT):
        raw = _view(value)
        if len(raw) % 4:
            raise DataError(f"{len(raw)} bytes of floats: the record is damaged")
        parts.append(np.frombuffer(raw, "<f4").astype(np.float64))
    return np.concatenate(parts) if parts else np.empty(0)


def _integers(data: memoryview) -> NDArray[np.float64]:
    values: list[int] = []
    for _, value in _fields(data, _LIST_OR_VARINT):
        if isinstance(value, int):
            values.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            values.append(number)
            if len(values) > MAX_VALUES:
                raise DataError(f"more than {MAX_VALUES} whole numbers")
    return np.array([value - (1 << 64) if value >> 63 else value for value in values], np.float64)


def _view(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise DataError("a number stands where bytes are expected: the record is damaged")
    return value


def _fields(data: memoryview, wanted: frozenset[tuple[int, int]]) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, value) of a message's wanted fields. Others are stepped over, as protocol buffers do."""
    numbers = {number for number, _ in wanted}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        value: memoryview | int
        if wire == _VARINT:
            value, at = _varint(data, at)
        else:
            if wire == _BYTES:
                size, at = _varint(data, at)
            elif wire in (_FIXED64, _FIXED32):
                size = 8 if wire == _FIXED64 else 4
            else:
                raise DataError(f"wire type {wire}: it is no protocol buffer, or damaged")
            if number == 0 or size > len(data) - at:
                raise DataError(
                    f"field {number} of {size} bytes where {len(data) - at} are left: the record is damaged"
                )
            value, at = data[at : at + size], at + size
        if (number, wire) in wanted:
            yield number, value
        elif number in numbers:
            raise DataError(f"field {number} has wire type {wire}: it is no tf.train.Example, or damaged")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, place behind it): 7 bits a byte, the lowest first, at most 10 bytes."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise DataError("a number without an end: the record is damaged")
