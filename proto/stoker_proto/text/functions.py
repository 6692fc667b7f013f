"""Functions that a dialogue offers and calls, and how they are written where a template has no form of its own for them.

The form is that of Hermes and Qwen 2.5: definitions in the system turn between <tools> and </tools>, one JSON object per line;
each call in the assistant's turn between <tool_call> and </tool_call>:

    <tool_call>
    {"name": "add", "arguments": {"a": 1}}
    </tool_call>

Reasoning that a template has no place for is written before the answer, as `<think>\\n...\\n</think>\\n\\n`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stoker_proto.text.turns import Call, Turn

Tools = Sequence[dict[str, Any]]
"""Definitions of functions, as JSON objects in the form of the data."""

_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def tools_text(tools: Tools) -> str:
    """The system text about the functions; "" where there are none."""
    if not tools:
        return ""
    return _TOOLS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def call_text(call: Call) -> str:
    """One call."""
    tree = {"name": call.name, "arguments": call.arguments}
    return f"<tool_call>\n{json.dumps(tree, ensure_ascii=False)}\n</tool_call>"


def reasoning_text(reasoning: str) -> str:
    """Reasoning in front of an answer."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n"


def write_functions(turns: Sequence[Turn], tools: Tools) -> list[Turn]:
    """The turns with definitions and calls as text."""
    written = [
        replace(turn, text="\n".join(filter(None, (turn.text, *map(call_text, turn.calls)))), calls=())
        if turn.calls
        else turn
        for turn in turns
    ]
    text = tools_text(tools)
    if text and written and written[0].role == "system":
        own = written[0].text
        written[0] = replace(written[0], text=f"{own}\n\n{text}" if own.strip() else text)
    elif text:
        # learned only where every turn is, so that a dialogue that is learned as a whole stays one
        written.insert(0, Turn(role="system", text=text, learned=all(turn.learned for turn in turns)))
    return written


def write_reasoning(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with the assistant's reasoning as text."""
    return [
        replace(turn, text=reasoning_text(turn.reasoning) + turn.text, reasoning=None)
        if turn.reasoning and turn.reasoning.strip()
        else turn
        for turn in turns
    ]
