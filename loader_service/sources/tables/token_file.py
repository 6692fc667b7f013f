"""Files of token ids as tables: rows of a fixed number of tokens, the last one may be shorter.

tokens.npy     a one-dimensional array of integers
train.bin      the bare numbers, little-endian, as nanoGPT writes them; data.options.dtype says which
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loader_service.sources.jsonl import read_line
from loader_service.sources.npy_header import MAX_HEADER_BYTES, parse_npy_header
from loader_service.sources.tables.table import ScannedRow, Span
from stoker_proto.errors import DataError

TOKEN_SUFFIXES = (".npy", ".bin")
COLUMN = "input_ids"
_LOOKED_AT_BYTES = 1 << 14
_DIFFERENT, _LARGEST_UPPER = 32, 3  # ids of vocabularies up to 262,144


def refuse_wider(path: Path) -> None:
    """Raises DataError for a .bin file that seems to hold numbers of 32 or 64 bits: read as uint16, every second id would be the
    upper half of the one before it."""
    with path.open("rb") as file:
        head = file.read(_LOOKED_AT_BYTES)
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    lower, upper = numbers[::2], numbers[1::2]
    if len(np.unique(lower)) >= _DIFFERENT and upper.max() <= _LARGEST_UPPER:
        raise DataError(
            f"every second of its first {numbers.size} numbers is at most {_LARGEST_UPPER}, as if they were wider than uint16: "
            "set data.options.dtype to uint32 or int64, or to uint16 if that is right",
            file=str(path),
        )


class TokenFile:
    """Offsets and sizes are bytes; a row is {"input_ids": array}."""

    def __init__(self, path: Path, dtype: str, record_tokens: int, *, is_npy: bool) -> None:
        """dtype: of a .bin file. Raises DataError."""
        self.path = path
        self._start, self._dtype = 0, np.dtype(dtype).newbyteorder("<")
        self._stop = path.stat().st_size
        if is_npy:
            with path.open("rb") as file:
                header = parse_npy_header(file.read(MAX_HEADER_BYTES))
            if len(header.shape) != 1 or header.dtype.kind not in "iu":
                raise DataError(f"{header.dtype}{list(header.shape)}: a one-dimensional array of integers is expected")
            self._start, self._dtype = header.size_bytes, header.dtype
            if self._start + header.shape[0] * header.dtype.itemsize != self._stop:
                raise DataError(
                    f"its header promises {header.shape[0]} numbers, and it has {self._stop - self._start} bytes of "
                    f"{header.dtype}: copy it again"
                )
        if (self._stop - self._start) % self._dtype.itemsize:
            raise DataError(
                f"{self._stop} bytes are no whole number of {self._dtype}: correct data.options.dtype, or copy it again"
            )
        self._row_bytes = record_tokens * self._dtype.itemsize

    def cut(self, part_bytes: int) -> list[int]:
        """One part: the scan only counts."""
        return [0, self._stop]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Every `record_tokens` tokens."""
        for offset in range(self._start, self._stop, self._row_bytes):
            yield Span(offset, min(self._row_bytes, self._stop - offset), None)

    def rows(self, start: int, stop: int) -> Iterator[ScannedRow]:
        """The same, read."""
        for offset, size, _ in self.spans(start, stop):
            yield ScannedRow(offset, size, self.row(offset, size))

    def row(self, offset: int, size: int) -> dict[str, Any]:
        """{"input_ids": integers[size / itemsize]}."""
        return {COLUMN: np.frombuffer(read_line(self.path, offset, size), self._dtype)}

    def where(self, offset: int) -> tuple[str, str]:
        """The row's number, from 0."""
        return "", f"{(offset - self._start) // self._row_bytes} (byte {offset})"
