"""Plain text files as tables: the whole file is one row, or each line, or each paragraph.

The first paragraph,          offset 0, size 35 (without the line feed)
of two lines.

The second one.               offset 37, size 15
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loader_service.sources.jsonl import BYTE_ORDER_MARK, MAX_LINE_BYTES, cut_lines, iter_lines, line_number, read_line
from loader_service.sources.tables.table import ScannedRow, Span
from stoker_proto.errors import DataError

Split = Literal["file", "lines", "paragraphs"]

_LONG_GAP = 1 << 16
"""Bytes between two lines that are no line's end, whatever they are."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text in UTF-8; offsets are bytes."""

    path: Path
    column: str
    """Under which a row has its text."""
    split: Split

    def cut(self, part_bytes: int) -> list[int]:
        """Lines at their ends; else one part."""
        return cut_lines(self.path, part_bytes) if self.split == "lines" else [0, self.path.stat().st_size]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Blank lines are no rows; a row is not larger than MAX_LINE_BYTES."""
        found: Iterator[tuple[int, int]]
        if self.split == "lines":
            found = ((offset, len(line)) for offset, line in iter_lines(self.path, start, stop))
        elif self.split == "paragraphs":
            found = self._paragraphs()
        else:
            found = iter([(0, self.path.stat().st_size)])
        for offset, size in found:
            if size > MAX_LINE_BYTES:
                raise DataError(
                    f"a text of {size} bytes at byte {offset}: at most {MAX_LINE_BYTES} are one row; set data.options.split to "
                    "lines or paragraphs, or use smaller files"
                )
            yield Span(offset, size, None)

    def rows(self, start: int, stop: int) -> Iterator[ScannedRow]:
        """Each text, read."""
        for offset, size, _ in self.spans(start, stop):
            row: dict[str, Any] | DataError
            try:
                row = self.row(offset, size)
            except DataError as error:
                row = error
            yield ScannedRow(offset, size, row)

    def row(self, offset: int, size: int) -> dict[str, Any]:
        """{column: text}; line feeds stay as they are."""
        content = read_line(self.path, offset, size)
        if offset == 0:
            content = content.removeprefix(BYTE_ORDER_MARK)
        try:
            return {self.column: content.decode("utf-8")}
        except UnicodeDecodeError as error:
            place = offset + error.start
            raise DataError(f"byte {place} is no UTF-8 ({error.reason}): convert the file to UTF-8") from error

    def where(self, offset: int) -> tuple[str, str]:
        """The line, as editors know it."""
        return ("", "") if self.split == "file" else (f":{line_number(self.path, offset)}", "")

    def _paragraphs(self) -> Iterator[tuple[int, int]]:
        """Runs of lines between blank ones."""
        start = end = 0
        for offset, line in iter_lines(self.path):
            if not end:
                start = offset
            elif offset - end > 1 and self._is_blank(end, offset):  # a line feed alone parts no paragraphs
                yield start, end - start
                start = offset
            end = offset + len(line)
        if end:
            yield start, end - start

    def _is_blank(self, end: int, offset: int) -> bool:
        """Whether a line lies between two, which `iter_lines` left out as blank."""
        return offset - end > _LONG_GAP or read_line(self.path, end, offset - end).count(b"\n") > 1
