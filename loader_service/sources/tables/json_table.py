"""JSON lines and JSON arrays as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from loader_service.sources.half_characters import mark_halves
from loader_service.sources.jsonl import cut_lines, iter_lines, line_number, parse_object, read_line
from loader_service.sources.record_numbers import Mark, record_number
from loader_service.sources.tables.json_array import iter_elements
from loader_service.sources.tables.table import TOO_DEEP, WEIGHTS, ScannedRow, Span, none_if_nan
from stoker_proto.errors import DataError

_BRACES = (b"{"[0], b"}"[0])


@dataclass(frozen=True, slots=True)
class JsonLines:
    """One object per line. Offsets are those of the objects; spaces around them are allowed."""

    path: Path

    def cut(self, part_bytes: int) -> list[int]:
        """At the ends of lines."""
        return cut_lines(self.path, part_bytes)

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Lines that are not one object from brace to brace have a problem."""
        for offset, line in self._lines(start, stop):
            problem = None if (line[0], line[-1]) == _BRACES else _broken_line(line)
            yield Span(offset, len(line), problem)

    def rows(self, start: int, stop: int) -> Iterator[ScannedRow]:
        """Each line parsed."""
        for offset, line in self._lines(start, stop):
            yield ScannedRow(offset, len(line), _parse(line))

    def row(self, offset: int, size: int) -> dict[str, Any]:
        """The object on the line."""
        return _parse_row(read_line(self.path, offset, size))

    def where(self, offset: int) -> tuple[str, str]:
        """The line, as editors know it."""
        return f":{line_number(self.path, offset)}", ""

    def _lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        for offset, line in iter_lines(self.path, start, stop):
            if line[:1].isspace() or line[-1:].isspace():
                offset += len(line) - len(line.lstrip())
                line = line.strip()
            yield offset, line


@dataclass(frozen=True, slots=True)
class JsonArray:
    """The objects of one array; offsets are those of their opening braces."""

    path: Path

    def cut(self, part_bytes: int) -> list[int]:
        """One part: where an object begins is known only from all that is before it."""
        return [0, self.path.stat().st_size]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """The objects, unparsed."""
        for offset, size in iter_elements(self.path):
            yield Span(offset, size, None)

    def rows(self, start: int, stop: int) -> Iterator[ScannedRow]:
        """Each object parsed."""
        with self.path.open("rb", buffering=1 << 20) as file:
            for offset, size in iter_elements(self.path):
                file.seek(offset)
                yield ScannedRow(offset, size, _parse(file.read(size)))

    def row(self, offset: int, size: int) -> dict[str, Any]:
        """The object there."""
        return _parse_row(read_line(self.path, offset, size))

    def where(self, offset: int) -> tuple[str, str]:
        """The record's number, from 0, and its byte."""
        return "", f"{record_number(self.path, offset, 0, _walk_elements)} (byte {offset})"


def _walk_elements(path: Path, mark: Mark, offset: int) -> Iterator[Mark]:
    for number, (place, _) in enumerate(iter_elements(path, mark), start=mark.number):
        yield Mark(place, number)
        if place >= offset:
            return


def _parse(text: bytes) -> dict[str, Any] | DataError:
    try:
        return _parse_row(text)
    except DataError as error:
        return error


def _parse_row(text: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(text)
    except ValueError:  # NaN, which pandas writes for what is missing, is null; half characters are marked
        try:
            row = mark_halves(_without_nan(parse_object(text)))
        except RecursionError as error:
            raise DataError(TOO_DEEP) from error
    if not isinstance(row, dict):
        raise DataError(f"a JSON object is expected, not {type(row).__name__}")
    return row


def _without_nan(value: Any) -> Any:
    """The JSON value with null for every number that is none, except weights, which are refused."""
    if isinstance(value, dict):
        return {key: inner if key in WEIGHTS else _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return none_if_nan(value)


def _broken_line(line: bytes) -> str:
    shown = line[:40].decode("utf-8", "replace")
    return (
        f"a line that begins with {shown!r} and is not one JSON object from {{ to }}: it is cut short, or the file is no "
        "JSON lines; write one object per line, or one array"
    )
