"""Repairs broken dialogues by these rules, in this order; each use is counted. A dialogue that stays broken is a bad record.

1. a turn without words is dropped, except the empty result of a function that was called
2. turns before the first user turn (but the system's) are dropped
3. two turns of the user in a row are merged with a blank line, and so are two of the assistant that are learned alike
4. turns after the assistant's last one are dropped
5. nothing to learn is left: an error
"""

from __future__ import annotations

from dataclasses import replace

from loader_service.sources.chat.message import Message
from stoker_proto.errors import DataError

EMPTY = "a turn without words was dropped"
EARLY = "turns before the user's first were dropped"
MERGED = "two turns of one speaker in a row were merged"
TRAILING = "turns after the assistant's last were dropped"


def mend(messages: list[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """The dialogue as it is trained, and the rules that changed it. Raises DataError where nothing is left to learn."""
    notes: dict[str, None] = {}
    if not messages:
        raise DataError("a dialogue without a turn: remove it")
    kept: list[Message] = []
    for message in messages:
        is_result = message.role == "tool" and bool(kept) and (bool(kept[-1].calls) or kept[-1].role == "tool")
        if is_result or message.text.strip() or message.reasoning or message.calls:
            kept.append(message)
    if len(kept) < len(messages):
        notes[EMPTY] = None
    first_user = next((i for i, message in enumerate(kept) if message.role == "user"), len(kept))
    system = [message for message in kept[:first_user] if message.role == "system"]
    if len(system) < first_user:
        notes[EARLY] = None
    merged: list[Message] = []
    for message in [*system, *kept[first_user:]]:
        last = merged[-1] if merged else None
        # Text behind a call stays a turn of its own: it was said after the call.
        said_after = last is not None and last.calls and (message.text.strip() or message.reasoning)
        if last is not None and last.role == message.role != "tool" and _alike(last, message) and not said_after:
            merged[-1] = _joined(last, message)
            notes[MERGED] = None
        else:
            merged.append(message)
    end = max((i + 1 for i, message in enumerate(merged) if message.role == "assistant"), default=0)
    if end == 0:
        found = ", ".join(dict.fromkeys(message.role for message in messages))
        raise DataError(f"no words of the assistant after a user's turn (roles: {found}): nothing can be learned")
    if end < len(merged):
        notes[TRAILING] = None
    return merged[:end], tuple(notes)


def _alike(first: Message, second: Message) -> bool:
    """Whether the same is learned of both."""
    return (first.learned, first.in_prompt) == (second.learned, second.in_prompt)


def _joined(first: Message, second: Message) -> Message:
    text = "\n\n".join(message.text for message in (first, second) if message.text.strip())
    reasoning = "\n\n".join(message.reasoning for message in (first, second) if message.reasoning) or None
    images, calls = first.images + second.images, first.calls + second.calls
    return replace(first, text=text, images=images, reasoning=reasoning, calls=calls)
