"""The text of a chat template in which control tokens of the data are marked, though the template read the original text.

A template may look at what a turn says: Qwen 3 looks for `</think>`. So it gets the original text. Where that text holds control
tokens, the template also renders the marked text. Where both renderings are the same apart from the marks, the marked one is the
result. Elsewhere the turn's text is looked for in the rendering of the original, and marked there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stoker_proto.errors import DataError
from stoker_proto.text.chat_messages import REASONING_FIELDS, Message, marked_values
from stoker_proto.text.chat_template import ChatTemplate
from stoker_proto.text.control_tokens import ControlTokens, is_marked, unmarked, without_marks
from stoker_proto.text.functions import Tools
from stoker_proto.text.turns import Parts, Turn


@dataclass(frozen=True, slots=True)
class Chat:
    """A dialogue as the template takes it."""

    messages: list[Message]
    """With marked control tokens."""
    tools: Tools
    original: tuple[list[Message], Tools] | None
    """The same without marks; None where there are none."""


class ChatWriter:
    """Writes dialogues, and beginnings of them."""

    def __init__(self, template: ChatTemplate, control: ControlTokens, finish: Callable[[str], str]) -> None:
        """finish: applied to every text."""
        self._template, self._control, self._finish = template, control, finish

    def chat(self, turns: Sequence[Turn], parts: Sequence[Parts], tools: Tools) -> Chat:
        """The input of `text`."""
        has_marks = False

        def mark(text: str, of_assistant: bool) -> str:
            nonlocal has_marks
            marked = self._control.mark(text, of_assistant=of_assistant)
            has_marks = has_marks or (marked is not text and is_marked(marked))
            return marked

        messages = self._template.messages(turns, parts, mark)
        marked_tools = [marked_values(tool, mark, False) for tool in tools]
        if not has_marks:
            return Chat(messages, marked_tools, None)
        original = self._template.messages(turns, parts, _original)
        return Chat(messages, marked_tools, (original, [marked_values(tool, _original, False) for tool in tools]))

    def text(self, chat: Chat, number: int, *, opening: bool) -> str:
        """The text of the first `number` turns. Raises DataError where the template does not take them."""
        if chat.original is None:
            return self._finish(self._template.render(chat.messages[:number], opening=opening, tools=chat.tools))
        messages, tools = chat.original
        original = self._template.render(messages[:number], opening=opening, tools=tools)
        try:
            marked = self._template.render(chat.messages[:number], opening=opening, tools=chat.tools)
        except DataError:  # the marks are in its way
            marked = ""
        if unmarked(marked) != original:
            marked = _placed(original, chat, number)
        return self._finish(marked)


def _original(text: str, of_assistant: bool) -> str:
    return without_marks(text)


def _placed(original: str, chat: Chat, number: int) -> str:
    """`original` with marks in the texts of the turns. Raises DataError where a text cannot be found for certain."""
    wanted: dict[str, list[str]] = {}
    for marked in itertools.chain(_texts([_once(message) for message in chat.messages[:number]]), _texts(chat.tools)):
        if is_marked(marked):
            wanted.setdefault(unmarked(marked).strip(), []).append(marked.strip())
    placed: list[tuple[int, int, str]] = []
    for said, marked_texts in wanted.items():
        places = list(_places(original, said))
        if len(places) != len(marked_texts) or len(set(marked_texts)) > 1:
            raise DataError(
                f"the model's chat template treats control tokens inside a turn's text specially, and the text {said[:60]!r} "
                "cannot be told from what the template writes itself: take these tokens out of the text"
            )
        placed += [(start, start + len(said), marked_texts[0]) for start in places]
    pieces, position = [], 0
    for start, stop, marked in sorted(placed):
        if start < position:
            raise DataError(
                "two turns with control tokens have texts that contain one another, and the model's chat template treats such "
                "tokens specially: take them out of the text"
            )
        pieces += [original[position:start], marked]
        position = stop
    return "".join([*pieces, original[position:]])


def _places(text: str, said: str) -> Iterator[int]:
    start = text.find(said)
    while start >= 0:
        yield start
        start = text.find(said, start + 1)


def _once(message: Message) -> Message:
    """The message with its reasoning under one name."""
    return {key: value for key, value in message.items() if key not in REASONING_FIELDS[1:]}


def _texts(value: Any) -> Iterator[str]:
    """Every text and key in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
