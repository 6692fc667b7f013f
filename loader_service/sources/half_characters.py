"""Half of a surrogate pair in JSON text, which is no character: `"\\ud800"`. Python's JSON reader makes a text of it that
nothing can write or tokenise.

In a field that nobody reads it is no reason to refuse the row. So a row keeps such a text as a `HalfCharacter`, which is no
`str`. Who reads the field calls `refuse_half`, and the error names it.
"""

from __future__ import annotations

import json
from typing import Any

from stoker_proto.errors import DataError

_MAX_SHOWN = 60


class HalfCharacter:
    """A text of a row that holds half of a surrogate pair."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return repr(self.text)  # escapes what is no character


def is_whole(text: str) -> bool:
    """Whether the text has characters only."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mark_halves(value: Any) -> Any:
    """The JSON value with a HalfCharacter for each text that holds half a character. A key that does is escaped, and its value
    is one, too."""
    if isinstance(value, str):
        return value if is_whole(value) else HalfCharacter(value)
    if isinstance(value, list):
        return [mark_halves(item) for item in value]
    if isinstance(value, dict):
        return {
            key if is_whole(key) else key.encode("utf-8", "backslashreplace").decode(): mark_halves(item)
            if is_whole(key)
            else HalfCharacter(key)
            for key, item in value.items()
        }
    return value


def load_json(text: str) -> Any:
    """The value of a JSON text, with its halves marked. Raises ValueError or RecursionError."""
    value = json.loads(text)
    return mark_halves(value) if "\\u" in text or not is_whole(text) else value


def refuse_half(value: object, field: str) -> None:
    """Raises DataError where the value is a HalfCharacter."""
    if type(value) is HalfCharacter:
        shown = repr(value)
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[: _MAX_SHOWN - 3]}..."
        raise DataError(f"{shown}: half of a surrogate pair is no character; correct or remove the row", field=field)
