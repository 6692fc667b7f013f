"""Fields of rows that nothing reads: preference rows are refused, other fields are counted and named by loader-prepare.

{"messages": [{"role": "user", "content": "Hi", "name": "Ann"}, ...], "score": 3}
not read: turn field 'name'
not read: field 'score'
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from stoker_proto.errors import DataError

UNREAD = "not read: "
"""All these notes begin so: loader-prepare bounds how many of them it tells apart."""
OF_THE_FIRST = " (of the first "
"""In notes that a scan makes of a part of the records; where all are read, reading makes them of all."""
REASONED = "reasoning beside the content: handed to the template (data.options.reasoning)"
"""Of a record whose turns have reasoning: whether it is learned depends on the template."""
_MAX_NAME = 60
_PAIR = ("chosen", "rejected")
PREFERENCES = (*_PAIR, "label")
"""Fields of preference data."""
_PREFERENCES = frozenset(PREFERENCES)


def unread(row: Mapping[str, Any], known: Collection[str], place: str = "") -> tuple[str, ...]:
    """Notes on the fields that are not known. A field that is null or empty says nothing.

    known: quickest as a frozenset. place: where they stand, e.g. "turn".
    """
    if isinstance(known, frozenset) and row.keys() <= known:
        return ()
    return tuple(unread_note(name, place) for name in row if name not in known and says_something(row[name]))


def unread_note(name: object, place: str = "") -> str:
    """The note on one field."""
    shown = repr(name)
    shown = shown if len(shown) <= _MAX_NAME else f"{shown[: _MAX_NAME - 3]}..."
    return f"{UNREAD}{place} field {shown}" if place else f"{UNREAD}field {shown}"


def says_something(value: Any) -> bool:
    """Whether it is more than null, an empty text, list or object, or false."""
    return value is not None and value is not False and not (isinstance(value, str | list | dict) and len(value) == 0)


def refuse_preferences(row: Mapping[str, Any], named: Iterable[str] = ()) -> None:
    """Raises DataError for a row of preference data: which of two answers is better, or whether an answer is wanted.

    named: fields that the options name, so that the user has said what they are.
    """
    if _PREFERENCES.isdisjoint(row):
        return
    named = set(named)
    pair = [name for name in _PAIR if says_something(row.get(name))]
    if pair and named.isdisjoint(_PAIR):
        raise DataError(
            f"a preference row ({' and '.join(pair)}): it says which answer is better, and supervised fine-tuning learns one "
            "answer. To learn the chosen ones, name that field: data.options.columns {messages: chosen} for lists of turns, "
            "{completion: chosen} beside a prompt",
            field=pair[0],
        )
    if type(row.get("label")) is bool and "label" not in named:
        raise DataError(
            f"a preference row (label: {str(row['label']).lower()}): it says whether the answer is wanted, and supervised "
            "fine-tuning learns every answer. Keep the rows whose label is true in a file without that field",
            field="label",
        )
