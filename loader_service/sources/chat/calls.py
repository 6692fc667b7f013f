"""Calls of functions, in the forms in which rows have them.

    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}      OpenAI's
    {"name": "add", "arguments": {"a": 1}}                                                        its old function_call, ShareGPT
    {"name": "add", "args": {"a": 1}, "id": "c1"}                                                 LangChain's
    {"name": "add", "parameters": {"a": 1}}                                                       as Llama 3 writes them

A call without arguments has none of these fields, or an empty one.
"""

from __future__ import annotations

from typing import Any

from loader_service.sources.chat.message import parse_json, refuse_halves, shown, without_nulls
from loader_service.sources.fields import unread
from loader_service.sources.half_characters import refuse_half
from stoker_proto.errors import DataError
from stoker_proto.text.turns import Call

_ARGUMENTS = ("arguments", "args", "parameters", "input")
"""Names of the arguments."""
_KNOWN = frozenset((*_ARGUMENTS, "name", "id", "type", "index", "function"))


def calls_of(turn: dict[str, Any], place: str) -> tuple[tuple[Call, ...], dict[str, None]]:
    """The calls of an OpenAI message: its `tool_calls`, and `function_call`, as they were before; and notes on fields of calls
    that are not read. Raises DataError."""
    calls, old_call = turn.get("tool_calls") or [], turn.get("function_call")
    if not calls and old_call is None:
        return (), {}
    if not isinstance(calls, list):
        raise DataError("a list of calls is expected", field=f"{place}.tool_calls")
    found = [(call, f"{place}.tool_calls[{j}]") for j, call in enumerate(calls)]
    if old_call is not None:
        found.append((old_call, f"{place}.function_call"))
    notes: dict[str, None] = {}
    return tuple(_call(call, where, notes) for call, where in found), notes


def calls_in_text(text: str, field: str) -> tuple[tuple[Call, ...], dict[str, None]]:
    """The same of a turn of role function_call: the JSON text of one call, or of a list of them. Raises DataError."""
    calls = parse_json(text, field)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise DataError("the JSON of {name, arguments}, or a list of them, is expected", field=field)
    notes: dict[str, None] = {}
    return tuple(_call(call, field, notes) for call in calls), notes


def _call(call: object, field: str, notes: dict[str, None]) -> Call:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise DataError("an object with name and arguments is expected", field=field)
    parts = [call] if function is call else [function, call]
    for part in parts:
        notes.update(dict.fromkeys(unread(part, _KNOWN, "call")))
    name, id = function.get("name"), call.get("id")
    refuse_half(id, f"{field}.id")
    if not isinstance(name, str) or not name:
        refuse_half(name, f"{field}.name")
        raise DataError(f"{shown(name)}: the name of a function is expected", field=f"{field}.name")
    return Call(name, _arguments(parts, field), id if isinstance(id, str) else "")


def _arguments(parts: list[dict[str, Any]], field: str) -> Any:
    """What the function is called with: an object, or the JSON text of one; "" and null: none."""
    given = [(name, part[name]) for part in parts for name in _ARGUMENTS if part.get(name) is not None]
    if len(given) > 1:
        names = " and ".join(name for name, _ in given)
        raise DataError(f"a call with {names}: keep the one that holds its arguments", field=field)
    for name, value in given:
        if not isinstance(value, str):
            return without_nulls(value, f"{field}.{name}")
        if value.strip():
            arguments = parse_json(value, f"{field}.{name}")
            refuse_halves(arguments, f"{field}.{name}")
            return {} if arguments is None else arguments
    return {}
