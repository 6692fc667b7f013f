"""The chat formats, one function each: a row -> messages and the images that belong to them.

    alpaca      {"instruction": "Add.", "input": "1 2", "output": "3", "system": "...", "history": [["Hi", "Hello"]]}
    sharegpt    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "images": ["a.jpg"]}
    messages    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    ultrachat   {"id": "0", "data": ["Hi", "Hello", "How are you?", "Fine."]}

The images of a row are its column `images`, a list, or `image`, the only one (LLaVA). The format with `prompt` and `messages` of
UltraChat 200k is `messages`. A column that is null is not there, as parquet has all columns in all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loader_service.sources.chat.message import (
    Message,
    call_text,
    parse_json,
    role_of,
    text_of,
    tools_text,
    weight_of,
)
from loader_service.sources.chat.parts import content_of
from stoker_proto.errors import DataError


@dataclass(slots=True)
class Conversation:
    """What a row says."""

    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    """The row's own: paths, data URIs, or {"bytes": ..., "path": ...}."""
    tools: str = ""
    """What is to be said of functions, behind the system text."""


Format = Callable[[dict[str, Any]], Conversation]


def alpaca(row: dict[str, Any]) -> Conversation:
    """User turn: instruction and, on a line of its own, input. History comes before it."""
    messages = []
    for i, pair in enumerate(_list(row, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("a [question, answer] is expected", field=f"history[{i}]")
        messages += [
            Message("user", text_of(pair[0], f"history[{i}][0]")),
            Message("assistant", text_of(pair[1], f"history[{i}][1]")),
        ]
    question = text_of(row.get("instruction"), "instruction")
    extra = text_of(row["input"], "input") if row.get("input") is not None else ""
    if extra.strip():
        question = f"{question}\n{extra}" if question.strip() else extra
    messages += [Message("user", question), Message("assistant", text_of(row.get("output"), "output"))]
    return _conversation(row, messages)


def sharegpt(row: dict[str, Any]) -> Conversation:
    """Turns of `from` and `value`; `role` and `content` are taken too."""
    messages = []
    for i, turn in enumerate(_turns(row, "conversations")):
        place = f"conversations[{i}]"
        name_key = "from" if turn.get("from") is not None else "role"
        text_key = "value" if turn.get("value") is not None or "content" not in turn else "content"
        role = role_of(turn.get(name_key), f"{place}.{name_key}")
        text = text_of(turn.get(text_key), f"{place}.{text_key}")
        if turn.get(name_key) == "function_call":
            text = _function_call(text, f"{place}.{text_key}")
        messages.append(Message(role, text, weight_of(turn, place)))
    return _conversation(row, messages)


def openai(row: dict[str, Any]) -> Conversation:
    """Content is a text or a list of parts (text, image_url, image); calls of functions follow the content."""
    messages, has_images = [], bool(_images(row))
    for i, turn in enumerate(_turns(row, "messages")):
        place = f"messages[{i}]"
        role = role_of(turn.get("role"), f"{place}.role")
        calls, content = _calls(turn, place), turn.get("content")
        if content is None and (calls or role == "assistant"):
            content = ""
        text, images = content_of(content, role, f"{place}.content", has_images=has_images)
        texts = [text, *calls] if text else calls
        messages.append(Message(role, "\n".join(texts), weight_of(turn, place), images))
    return _conversation(row, messages)


def ultrachat(row: dict[str, Any]) -> Conversation:
    """User and assistant in turn, beginning with the user."""
    texts = [text_of(text, f"data[{i}]") for i, text in enumerate(_list(row, "data"))]
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return _conversation(row, messages)


FORMATS: dict[str, tuple[str, Format]] = {
    "messages": ("messages", openai),
    "sharegpt": ("conversations", sharegpt),
    "ultrachat": ("data", ultrachat),
    "alpaca": ("instruction", alpaca),
}
"""Name -> (the column that tells it from the others, its function). The first whose column a row has is taken."""

COLUMNS = (
    *("messages", "conversations", "data", "instruction", "input", "output", "history"),
    *("system", "tools", "functions", "images", "image"),
)
"""All columns that the formats read."""


def format_of(row: dict[str, Any], fields: str = "") -> str:
    """The name of the row's format. fields: what the file calls those that it has, for the error. Raises DataError."""
    for name, (column, _) in FORMATS.items():
        if row.get(column) is not None:
            return name
    known = ", ".join(f"{name} ({column})" for name, (column, _) in FORMATS.items())
    raise DataError(
        f"fields {fields or ', '.join(map(str, row)) or 'none'}: none of the known formats, which are {known}; name your columns "
        "in data.options.columns"
    )


def _conversation(row: dict[str, Any], messages: list[Message]) -> Conversation:
    """With what all formats may have: a system text, if no message is one, functions, and images."""
    system = text_of(row["system"], "system") if row.get("system") is not None else ""
    if system.strip() and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", system))
    name = "functions" if row.get("tools") is None else "tools"  # what OpenAI called them before
    tools = tools_text(row[name], name) if row.get(name) is not None else ""
    return Conversation(messages, _images(row), tools)


def _calls(turn: dict[str, Any], place: str) -> list[str]:
    """Calls of an OpenAI message as they are written down: its `tool_calls`, and `function_call`, as they were before."""
    calls, old_call = turn.get("tool_calls") or [], turn.get("function_call")
    if not calls and old_call is None:
        return []
    if not isinstance(calls, list):
        raise DataError("a list of calls is expected", field=f"{place}.tool_calls")
    found = [(call, f"{place}.tool_calls[{j}]") for j, call in enumerate(calls)]
    if old_call is not None:
        found.append((old_call, f"{place}.function_call"))
    texts = []
    for call, where in found:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise DataError("an object with name and arguments is expected", field=where)
        texts.append(call_text(function.get("name"), function.get("arguments"), where))
    return texts


def _function_call(text: str, field: str) -> str:
    """ShareGPT's function_call: the JSON text of one call, or of a list of them."""
    calls = parse_json(text, field)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise DataError("the JSON of {name, arguments}, or a list of them, is expected", field=field)
    return "\n".join(call_text(call.get("name"), call.get("arguments"), field) for call in calls)


def _images(row: dict[str, Any]) -> list[Any]:
    """The row's `images`, or its `image`: a list, or the only one."""
    for name in ("images", "image"):
        value = row.get(name)
        if isinstance(value, str | bytes | dict):
            return [value]
        if images := _list(row, name):
            return images
    return []


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{type(value).__name__}: a list is expected", field=name)
    return list(value)


def _turns(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    turns = _list(row, name)
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"{type(turn).__name__}: an object is expected", field=f"{name}[{i}]")
    return turns
