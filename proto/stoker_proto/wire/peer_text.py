"""A peer's text, made safe for messages and logs: one short line, cheap to make from text of any size."""

from __future__ import annotations

import reprlib
from typing import Any

_MAX_VALUE = 80


def shown(value: Any) -> str:
    """A value of any type, quoted like Python's literals, of at most 80 characters and ASCII only."""
    if isinstance(value, str | bytes):
        return ascii(value[:_MAX_VALUE])[:_MAX_VALUE]
    return plain(reprlib.repr(value), _MAX_VALUE)


def plain(text: str, limit: int = 200) -> str:
    """The text without quotes around it. Control, bidirectional and other unprintable characters are escaped, so that it cannot
    forge a line of a log or move a terminal's cursor. At most `limit` characters, the last three dots where it was cut."""
    cut = text[: limit + 1]
    escaped = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in cut)
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."
