"""What the formats share: a message, the roles, definitions of functions.

How functions are written is the chat template's matter, or that of `stoker_proto.text.functions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from loader_service.sources.half_characters import load_json, refuse_half
from stoker_proto.errors import DataError
from stoker_proto.text.turns import Call

Role = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
}
"""Names of roles in files -> roles of turns."""


@dataclass(slots=True)
class Message:
    """One message of a row, before broken dialogues are mended."""

    role: Role
    text: str
    learned: bool | None = None
    """What the row itself says; None: nothing."""
    images: tuple[Any, ...] = ()
    """Where to find those that are marked in the text, in their order; None, or none at all: the next of the row's `images`."""
    reasoning: str | None = None
    """What the assistant thinks before it answers, where the row keeps it beside the content."""
    in_prompt: bool = False
    """Part of what the row calls its prompt: no answer of it is learned."""
    calls: tuple[Call, ...] = ()
    """Functions that the assistant calls after its text."""
    call_id: str = ""
    """Of a tool's message: the call that it answers."""


def role_of(name: object, field: str) -> Role:
    """The role behind a name. Raises DataError."""
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        refuse_half(name, field)
        raise DataError(
            f"role {name!r}: {', '.join(ROLES)} are known; name others in data.options.roles, e.g. {{bot: assistant}}",
            field=field,
        )
    return role


def text_of(value: object, field: str) -> str:
    """The value, which must be a text. Raises DataError."""
    if not isinstance(value, str):
        refuse_half(value, field)
        raise DataError(f"{shown(value)}: a text is expected", field=field)
    return value


def tools_of(tools: object, field: str) -> tuple[dict[str, Any], ...]:
    """Definitions of functions: a list of objects, or the JSON text of one; () where there are none. Raises DataError."""
    refuse_half(tools, field)
    if isinstance(tools, str):
        if not tools.strip():
            return ()
        tools = parse_json(tools, field)
    if isinstance(tools, dict):
        tools = [tools]
    if isinstance(tools, list):  # of texts, as in some parquet files
        tools = [parse_json(tool, field) if isinstance(tool, str) and tool[:1] == "{" else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{shown(tools)}: a list of function definitions (objects) is expected", field=field)
    return tuple(without_nulls(tool, f"{field}[{i}]") for i, tool in enumerate(tools))


def without_nulls(value: Any, field: str) -> Any:
    """Without keys whose value is null, at any depth: parquet gives each object the keys of all others.

    Raises DataError for half a character."""
    if isinstance(value, dict):
        return {key: without_nulls(item, f"{field}.{key}") for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item, f"{field}[{i}]") for i, item in enumerate(value)]
    refuse_half(value, field)
    return value


def refuse_halves(value: Any, field: str) -> None:
    """Raises DataError for half a character, at any depth."""
    without_nulls(value, field)


def parse_json(text: str, field: str) -> Any:
    """JSON inside of a text field. Raises DataError."""
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(text)} is no JSON ({error})", field=field) from error


def shown(value: object) -> str:
    """The beginning of a wrong value, for an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
