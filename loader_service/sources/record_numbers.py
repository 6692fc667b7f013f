"""Number of the record at a byte offset, for error messages: which line of a file it is, which element of an array.

    offset   0      1,048,577      2,097,153      ...      marks of a file: an offset, and the number of its record
    number   1      3,120          6,233

The number is counted from the last mark before the offset. Counting leaves a mark about every MiB and one where it ended. So a
file is read once from its start, however many of its records are bad, and each further question reads about a MiB at most.
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from loader_service.shards import Stamp

MARK_BYTES = 1 << 20
_MOST_FILES = 64
_MOST_MARKS = 1 << 16
"""Of one file: 64 GiB. Behind the last of them, counting starts there or where the last question ended."""


class Mark(NamedTuple):
    """A record begins at `offset`, and it is number `number`."""

    offset: int
    number: int


Walk = Callable[[Path, Mark, int], Iterator[Mark]]
"""(file, from, to) -> marks in ascending order, the last one at `to`. Reads the file from the mark `from` on."""

_marks: OrderedDict[tuple[Path, Stamp], tuple[list[Mark], Mark]] = OrderedDict()
"""For each version of a file: the marks, a MiB apart, and where the last lookup ended."""
_lock = threading.Lock()


def record_number(path: Path, offset: int, first: int, walk: Walk) -> int:
    """Number of the record that begins at `offset`; `first` is the number of the one at the start. `walk` counts."""
    key = path, Stamp.of(path)
    start = Mark(0, first)
    with _lock:
        marks, latest = _marks.get(key, ([start], start))
        before = marks[bisect.bisect_right(marks, offset, key=lambda mark: mark.offset) - 1]
    if before.offset < latest.offset <= offset:
        before = latest
    found: list[Mark] = []
    for mark in walk(path, before, offset):  # without the lock: a file system may hang
        before = mark
        if not found or mark.offset >= found[-1].offset + MARK_BYTES:
            found.append(mark)
    with _lock:
        known, _ = _marks.pop(key, (marks, latest))
        for mark in found:
            if mark.offset >= known[-1].offset + MARK_BYTES and len(known) < _MOST_MARKS:
                known.append(mark)
        _marks[key] = known, before
        while len(_marks) > _MOST_FILES:
            _marks.popitem(last=False)
    return before.number
