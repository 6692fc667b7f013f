"""Where the objects of one big JSON array lie, without parsing it.

    [{"messages": []},              offset 1, size 16
     {"messages": [1, "}"]}]        offset 20, size 23

The file is read in blocks, each looked at by NumPy at about 150 MB/s: escapes are blanked, quotes give what is a string, brackets
outside of strings give the depth. An object of the array begins where the depth becomes 2 and ends where it becomes 1 again;
between two objects there is one comma. The content of an object is checked later, when it is parsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.jsonl import BYTE_ORDER_MARK, MAX_LINE_BYTES
from loader_service.sources.record_numbers import Mark
from stoker_proto.errors import DataError

BLOCK_BYTES = 1 << 20
_FIRST_BLOCK_BYTES = 64 << 10
"""Of an array that is read from its middle: often only a few objects are looked at."""
_FIRST = Mark(0, 0)

_QUOTE, _BACKSLASH, _OPENING_BRACE = b'"'[0], b"\\"[0], b"{"[0]
_STRUCTURAL = np.zeros(256, np.bool_)
_STRUCTURAL[list(b'"[]{}')] = True
_STEP = np.zeros(256, np.int8)  # what a bracket adds to the depth
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


def iter_elements(path: Path, start: Mark = _FIRST) -> Iterator[tuple[int, int]]:
    """(offset, size) of the objects of the array in the file, in order. Raises DataError that names the byte where it breaks.

    start: the object to begin with, by its offset and its number; that of number 0 is looked for from the start of the file."""
    scanner = _Scanner(path, start)
    size = _FIRST_BLOCK_BYTES if start.number else BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(scanner.position)
        while block := file.read(size):
            yield from scanner.feed(block)
            size = min(2 * size, BLOCK_BYTES)
    scanner.finish()


class _Scanner:
    def __init__(self, path: Path, start: Mark) -> None:
        self._path = path
        is_inside = start.number > 0
        self.position = start.offset if is_inside else 0  # of the next block in the file
        self._depth = int(is_inside)
        self._in_string = False
        self._escaping = False  # the last block ended with a backslash that escapes the next byte
        self._count = start.number
        self._start = -1  # of the object that is open; -1: none is
        self._gap = b"," if is_inside else b""  # what was read since the last object, without spaces

    def feed(self, block: bytes) -> Iterator[tuple[int, int]]:
        """The objects that end in the next block of the file."""
        position, end = self.position, 0  # end: of the last object, in this block
        opens, closes = self._edges(block)
        if self._start >= 0:
            opens = [-1, *opens]  # it was opened in an earlier block
        for number, start in enumerate(opens):
            if start >= 0:
                self._open(block, start, end)
            if number == len(closes):  # it ends in a later block
                break
            end = closes[number] + 1
            size = position + end - self._start
            self._check_size(size)
            yield self._start, size
            self._start = -1
            self._count += 1
        self.position += len(block)
        if self._start < 0:
            self._gap = self._gap_with(block[end:])
            if len(self._gap) > 4:  # no comma, bracket or half of a byte-order mark is that long, and nothing may grow
                raise self._misplaced(self._gap, self.position - len(block) + end)
        else:
            self._check_size(self.position - self._start)

    def finish(self) -> None:
        """Call at the end of the file."""
        where = f"the JSON array breaks off at byte {self.position}, the end of the file"
        if self._start >= 0:
            raise self._error(
                f"{where}, inside record {self._count}, which begins at byte {self._start}: copy the file again"
            )
        gap = self._gap
        if gap == (b"]" if self._count else b"[]"):
            return
        if gap in (b"", b",", b"["):
            raise self._error(f"{where}, after {self._count} records: its ] is missing; copy the file again")
        raise self._misplaced(gap, self.position - len(gap))

    def _edges(self, block: bytes) -> tuple[list[int], list[int]]:
        """Positions in the block where an object of the array opens, and where one closes."""
        blanked = self._blank_escapes(block)
        content = np.frombuffer(blanked, np.uint8)
        places: NDArray[np.int64] = np.flatnonzero(_STRUCTURAL[content])
        kinds = content[places]
        quotes = kinds == _QUOTE
        inside = np.logical_xor.accumulate(quotes) ^ self._in_string
        if len(inside):
            self._in_string = bool(inside[-1])
        outside = ~(inside | quotes)
        places, steps = places[outside], _STEP[kinds[outside]]
        depths = self._depth + np.cumsum(steps, dtype=np.int64)
        if len(depths):
            self._depth = int(depths[-1])
        opens = places[(steps > 0) & (depths == 2)].tolist()
        closes = places[(steps < 0) & (depths == 1)].tolist()
        return opens, closes

    def _blank_escapes(self, block: bytes) -> bytes:
        """The block with `\\\\` and `\\"` blanked, so that each quote that is left begins or ends a string."""
        if self._escaping:
            block = b"_" + block[1:]
        self._escaping = False
        if _BACKSLASH not in block:
            return block
        block = block.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self._escaping = block.endswith(b"\\")
        return block

    def _open(self, block: bytes, start: int, end: int) -> None:
        gap = self._gap_with(block[end:start])
        if gap != (b"," if self._count else b"["):
            raise self._misplaced(gap, self.position + start - len(gap))
        if block[start] != _OPENING_BRACE:
            raise self._error(
                f"record {self._count} at byte {self.position + start} is an array: JSON objects are expected"
            )
        self._start, self._gap = self.position + start, b""

    def _gap_with(self, more: bytes) -> bytes:
        gap = b"".join((self._gap + more).split())
        return gap if self._count else gap.removeprefix(BYTE_ORDER_MARK)

    def _misplaced(self, gap: bytes, position: int) -> DataError:
        shown = gap[:40].decode("utf-8", "replace")
        place = f"before record {self._count}" if self._count else "where the JSON array begins"
        return self._error(
            f"{shown!r} near byte {max(position, 0)}, {place}: an array of JSON objects with one comma between "
            "two of them is expected"
        )

    def _check_size(self, size: int) -> None:
        if size > MAX_LINE_BYTES:
            raise self._error(
                f"record {self._count} at byte {self._start} has more than {MAX_LINE_BYTES} bytes: it is no record, "
                "or a quote or bracket of it is never closed"
            )

    def _error(self, reason: str) -> DataError:
        return DataError(reason, file=str(self._path))
