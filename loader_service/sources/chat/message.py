"""What the formats share: a message, the roles, and how function calls are written as text.

Functions follow the convention of Hermes and Qwen 2.5: definitions in the system turn between <tools> and </tools>, one JSON
object per line; each call in the assistant's turn between <tool_call> and </tool_call>.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from stoker_proto.errors import DataError

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

_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


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


def role_of(name: object, field: str) -> Role:
    """The role behind a name. Raises DataError."""
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            f"role {name!r}: {', '.join(ROLES)} are known; name others in data.options.roles, e.g. {{bot: assistant}}",
            field=field,
        )
    return role


def text_of(value: object, field: str) -> str:
    """The value, which must be a text. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{_shown(value)}: a text is expected", field=field)
    return value


def call_text(name: object, arguments: object, field: str) -> str:
    """One call of a function, as it is written down; arguments: an object, or the JSON text of one."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{_shown(name)}: the name of a function is expected", field=f"{field}.name")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{field}.arguments")
    call = {"name": name, "arguments": {} if arguments is None else arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def tools_text(tools: object, field: str) -> str:
    """What the system turn says of the functions: a list of definitions, or the JSON text of one; "" where there are none."""
    if isinstance(tools, str):
        if not tools.strip():
            return ""
        tools = parse_json(tools, field)
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{_shown(tools)}: a list of function definitions (objects) is expected", field=field)
    if not tools:
        return ""
    return _TOOLS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def parse_json(text: str, field: str) -> Any:
    """JSON inside of a text field. Raises DataError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{_shown(text)} is no JSON ({error})", field=field) from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
