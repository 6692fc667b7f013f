"""Turns -> the messages that a chat template takes, in the form that this template takes them.

    {"role": "assistant", "content": "", "reasoning_content": "One call.", "thinking": "One call.",
     "tool_calls": [{"type": "function", "id": "call00000", "function": {"name": "add", "arguments": {"a": 1}}}]}

A key without a value is not there: some templates ask only whether it is. `reasoning_content`, `reasoning` and `thinking` are
the names that templates read, the same as in transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stoker_proto.text.turns import Call, Parts, Turn

Message = dict[str, Any]
Mark = Callable[[str, bool], str]
"""(a text, whether the assistant says it) -> the text as the template gets it, e.g. with its control tokens marked."""

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names that templates have for the reasoning of a turn; a message has it under each."""
_SHORT_ID = re.compile("[A-Za-z0-9]{9}")


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template takes calls of functions."""

    arguments_as_text: bool
    """Whether arguments are JSON text (DeepSeek V3). Other templates take them as an object."""
    own_ids: bool
    """Whether any id of the data is taken. Mistral's templates take only ids of nine letters and digits."""

    def id_of(self, call: Call, number: int, k: int) -> str:
        """The id of the k-th call of turn `number`: the data's, or a made one where there is none that the template takes."""
        return call.id if call.id and (self.own_ids or _SHORT_ID.fullmatch(call.id)) else f"call{number:03}{k:02}"


def messages_of(
    turns: Sequence[Turn], parts: Sequence[Parts], mark: Mark, form: CallForm | None, *, as_string: bool
) -> list[Message]:
    """One message for each turn. as_string: content is a string, not a list of parts. form: None where no turn has calls."""
    messages: list[Message] = []
    ids: dict[str, str] = {}  # the data's id -> the template's, of the last calls
    waiting: list[str] = []  # ids of the template, of calls that no tool answered yet
    for number, (turn, of_turn) in enumerate(zip(turns, parts, strict=True)):
        of_assistant = turn.role == "assistant"
        content = mark(of_turn[0] or "", of_assistant) if as_string else _content(of_turn, mark, of_assistant)
        message: Message = {"role": turn.role, "content": content}
        if turn.reasoning and turn.reasoning.strip():
            message |= dict.fromkeys(REASONING_FIELDS, mark(turn.reasoning, True))
        if turn.calls and form is not None:
            waiting = [form.id_of(call, number, k) for k, call in enumerate(turn.calls)]
            ids = {call.id: given for call, given in zip(turn.calls, waiting, strict=True) if call.id}
            message["tool_calls"] = [
                _call(call, given, mark, form) for call, given in zip(turn.calls, waiting, strict=True)
            ]
        elif turn.role == "tool":
            given = ids.get(turn.call_id) or next(iter(waiting), turn.call_id)
            if given:
                message["tool_call_id"] = mark(given, False)
                waiting = [other for other in waiting if other != given]
        messages.append(message)
    return messages


def marked_values(value: Any, mark: Mark, of_assistant: bool) -> Any:
    """A JSON value whose texts and keys, at any depth, went through `mark`: a template writes both."""
    if isinstance(value, str):
        return mark(value, of_assistant)
    if isinstance(value, dict):
        return {mark(key, of_assistant): marked_values(item, mark, of_assistant) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked_values(item, mark, of_assistant) for item in value]
    return value


def _content(parts: Parts, mark: Mark, of_assistant: bool) -> list[dict[str, str]]:
    return [{"type": "image"} if part is None else {"type": "text", "text": mark(part, of_assistant)} for part in parts]


def _call(call: Call, given: str, mark: Mark, form: CallForm) -> dict[str, Any]:
    arguments = marked_values(call.arguments, mark, True)
    if form.arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": mark(call.name, True), "arguments": arguments}
    return {"type": "function", "id": mark(given, False), "function": function}
