"""The chat formats, one function each: a row -> messages and the images that belong to them.

    alpaca              {"instruction": "Add.", "input": "1 2", "output": "3", "system": "...", "history": [["Hi", "Hello"]]}
    sharegpt            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "images": []}
    messages            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    ultrachat           {"id": "0", "data": ["Hi", "Hello", "How are you?", "Fine."]}
    prompt_completion   {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}

Lists of turns may be JSON text, or lists by field ({"role": [...], "content": [...]}), as tables keep them. The images of a row
are its column `images`, a list, or `image`, the only one (LLaVA). The format with `prompt` and `messages` of UltraChat 200k is
`messages`. A column that is null is not there, as parquet has all columns in all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loader_service.sources.chat.calls import calls_in_text, calls_of
from loader_service.sources.chat.message import ROLES, Message, parse_json, role_of, text_of, tools_of
from loader_service.sources.chat.parts import content_of
from loader_service.sources.chat.turn_fields import KNOWN, REASONING, reasoning_of, weight_of
from loader_service.sources.fields import says_something, unread, unread_note
from loader_service.sources.half_characters import load_json, refuse_half
from stoker_proto.errors import DataError


@dataclass(frozen=True, slots=True)
class Names:
    """What the options say of names in the files."""

    roles: Mapping[str, str] = field(default_factory=dict)
    """Name of a role in the files -> the one that is known."""
    turn_fields: Mapping[str, str] = field(default_factory=dict)
    """The format's field of a turn -> its name in the files."""

    def role(self, name: object) -> object:
        """The known name of the role, if the options have one."""
        return self.roles.get(name, name) if isinstance(name, str) else name

    def turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        """The turn with the format's names."""
        if not self.turn_fields:
            return turn
        renamed = {name: turn.get(in_file) for name, in_file in self.turn_fields.items()}
        taken = set(self.turn_fields.values())
        return {**{name: value for name, value in turn.items() if name not in taken}, **renamed}


@dataclass(slots=True)
class Conversation:
    """What a row says."""

    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    """The row's own: paths, data URIs, or {"bytes": ..., "path": ...}."""
    tools: tuple[dict[str, Any], ...] = ()
    """Definitions of functions."""
    notes: dict[str, None] = field(default_factory=dict)
    """On fields of turns and parts that are not read."""


Format = Callable[[dict[str, Any], Names], Conversation]


def alpaca(row: dict[str, Any], names: Names) -> Conversation:
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
    answer = Message("assistant", text_of(row.get("output"), "output"), reasoning=reasoning_of(row, ""))
    return _conversation(row, [*messages, Message("user", question), answer])


def sharegpt(row: dict[str, Any], names: Names) -> Conversation:
    """Turns of `from` and `value`, or of `role` and `content`, which are read as those of `messages`."""
    messages: list[Message] = []
    notes: dict[str, None] = {}
    has_images = bool(_images(row))
    for i, turn in enumerate(_turns(row, "conversations", names)):
        place = f"conversations[{i}]"
        if turn.get("from") is None and turn.get("value") is None and "role" in turn:
            message, more = _openai_turn(turn, place, names, has_images=has_images)
        else:
            message, more = _sharegpt_turn(turn, place, names)
        messages.append(message)
        notes |= more
    return _conversation(row, messages, notes)


def _sharegpt_turn(turn: dict[str, Any], place: str, names: Names) -> tuple[Message, dict[str, None]]:
    """The message, and notes on fields that are not read."""
    name_key = "from" if turn.get("from") is not None else "role"
    text_key = "value" if turn.get("value") is not None or "content" not in turn else "content"
    name = names.role(turn.get(name_key))
    role = role_of(name, f"{place}.{name_key}")
    message = Message(role, text_of(turn.get(text_key), f"{place}.{text_key}"), weight_of(turn, place))
    message.reasoning = reasoning_of(turn, place) if role == "assistant" else None
    notes = dict.fromkeys(unread(turn, _known_of_turn(role, name_key, text_key), "turn"))
    if name == _CALLING:
        message.calls, more = calls_in_text(message.text, f"{place}.{text_key}")
        message.text = ""
        notes |= more
    return message, notes


def openai(row: dict[str, Any], names: Names) -> Conversation:
    """Content is a text or a list of parts (text, image_url, image); calls of functions follow the content."""
    messages, notes = _openai_turns(row, "messages", names)
    return _conversation(row, messages, notes)


def ultrachat(row: dict[str, Any], names: Names) -> Conversation:
    """User and assistant in turn, beginning with the user."""
    texts = [text_of(text, f"data[{i}]") for i, text in enumerate(_list(row, "data"))]
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return _conversation(row, messages)


def prompt_completion(row: dict[str, Any], names: Names) -> Conversation:
    """Both are texts or lists of turns. What the assistant says in the prompt is not learned."""
    notes: dict[str, None] = {}
    messages: list[Message] = []
    row = {**row, "prompt": _said(row.get("prompt")), "completion": _said(row["completion"])}
    if isinstance(row["prompt"], str):
        messages.append(Message("user", row["prompt"]))
    elif row["prompt"] is not None:
        messages, notes = _openai_turns(row, "prompt", names)
    for message in messages:
        message.in_prompt = True
    if isinstance(row["completion"], str):
        answers = [Message("assistant", row["completion"])]
    else:
        answers, more = _openai_turns(row, "completion", names)
        notes |= more
    if answers and answers[0].role != "assistant":
        raise DataError(
            f"it begins with a turn of role {answers[0].role}: what follows the prompt is expected; a whole dialogue is named by "
            "data.options.columns {messages: ...}",
            field="completion",
        )
    reasoning = reasoning_of(row, "")
    if reasoning is not None and answers:
        if answers[-1].reasoning not in (None, reasoning):
            raise DataError("the row and its completion have different reasoning: keep one of them", field="completion")
        answers[-1].reasoning = reasoning
    return _conversation(row, [*messages, *answers], notes)


def _said(value: Any) -> Any:
    """The turns of a JSON text; any other text is what the user or the assistant says."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        turns = load_json(value)
    except (ValueError, RecursionError):
        return value
    are_turns = isinstance(turns, list) and bool(turns) and all(isinstance(t, dict) and "role" in t for t in turns)
    return turns if are_turns else value


FORMATS: dict[str, tuple[str, Format]] = {
    "messages": ("messages", openai),
    "sharegpt": ("conversations", sharegpt),
    "ultrachat": ("data", ultrachat),
    "alpaca": ("instruction", alpaca),
    "prompt_completion": ("completion", prompt_completion),
}
"""Name -> (the column that tells it from the others, its function). The first whose column a row has is taken."""

_COMMON = ("system", "tools", "functions", "images", "image")
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", *_COMMON),
    "sharegpt": ("conversations", *_COMMON),
    "ultrachat": ("data", *_COMMON),
    "alpaca": ("instruction", "input", "output", "history", *REASONING, *_COMMON),
    "prompt_completion": ("prompt", "completion", *REASONING, *_COMMON),
}
"""Name -> the columns that it reads."""
COLUMNS = tuple(dict.fromkeys(column for columns in FIELDS.values() for column in columns))
"""All columns that the formats read."""
NOT_SEEN = ("videos", "video", "audios", "audio")
"""Columns of what no model is shown: refused where they say something."""
_NOT_SEEN = frozenset(NOT_SEEN)


def format_of(row: dict[str, Any], in_file: dict[str, Any] | None = None) -> str:
    """The name of the row's format. in_file: the row with the names of the file, for the error. Raises DataError."""
    for name, (column, _) in FORMATS.items():
        if row.get(column) is not None:
            return name
    known = ", ".join(f"{name} ({column})" for name, (column, _) in FORMATS.items())
    fields = ", ".join(map(str, row if in_file is None else in_file)) or "none"
    tokens = "; token ids are read by data.dataset_type: text" if row.get("input_ids") is not None else ""
    raise DataError(
        f"fields {fields}: none of the known formats, which are {known}; name your columns "
        f"in data.options.columns{tokens}"
    )


def _conversation(row: dict[str, Any], messages: list[Message], notes: dict[str, None] | None = None) -> Conversation:
    """With what all formats may have: a system text, if no message is one, functions, and images."""
    for column in () if _NOT_SEEN.isdisjoint(row) else NOT_SEEN:
        if says_something(row.get(column)):
            raise DataError("only images are read: remove the row, or the field if it is not meant", field=column)
    system = text_of(row["system"], "system") if row.get("system") is not None else ""
    notes = {} if notes is None else notes
    if system.strip():
        if not messages or messages[0].role != "system":
            messages.insert(0, Message("system", system, in_prompt=bool(messages) and messages[0].in_prompt))
        elif not messages[0].text.strip():
            messages[0].text = system
        elif messages[0].text.strip() != system.strip():
            notes[unread_note("system")] = None
    name = "functions" if row.get("tools") is None else "tools"  # what OpenAI called them before
    for used, other in (("tools", "functions"), ("images", "image")):
        if says_something(row.get(used)) and says_something(row.get(other)):
            notes[unread_note(other)] = None
    tools = tools_of(row[name], name) if row.get(name) is not None else ()
    return Conversation(messages, _images(row), tools, notes)


def _openai_turns(row: dict[str, Any], name: str, names: Names) -> tuple[list[Message], dict[str, None]]:
    """The messages in a column, and notes on fields that are not read."""
    messages: list[Message] = []
    notes: dict[str, None] = {}
    has_images = bool(_images(row))
    for i, turn in enumerate(_turns(row, name, names)):
        message, more = _openai_turn(turn, f"{name}[{i}]", names, has_images=has_images)
        messages.append(message)
        if more:
            notes |= more
    return messages, notes


def _openai_turn(
    turn: dict[str, Any], place: str, names: Names, *, has_images: bool
) -> tuple[Message, dict[str, None]]:
    """The message, and notes on fields that are not read."""
    content, said = turn.get("content"), names.role(turn.get("role"))
    if turn.keys() == _PLAIN and isinstance(content, str) and said != _CALLING:  # nearly all turns, and much faster
        known = ROLES.get(said) if isinstance(said, str) else None
        return Message(known or role_of(said, f"{place}.role"), content), {}
    calls, notes = calls_of(turn, place)
    if said == _CALLING and not calls and isinstance(content, str):  # ShareGPT's role, with these names
        calls, notes = calls_in_text(content, f"{place}.content")
        content = ""
    role = role_of(said, f"{place}.role")
    reasoning = reasoning_of(turn, place) if role == "assistant" else None
    if content is None and (calls or role == "assistant"):
        content = ""
    found = content_of(content, role, f"{place}.content", has_images=has_images)
    if found.reasoning:
        thought = "\n\n".join(found.reasoning)
        if reasoning is not None and reasoning != thought:
            raise DataError("the turn and a part of it have different reasoning: keep one of them", field=place)
        reasoning = thought
    call_id = turn.get("tool_call_id")
    refuse_half(call_id, f"{place}.tool_call_id")
    message = Message(role, found.text, weight_of(turn, place), tuple(found.images), reasoning, calls=calls)
    message.call_id = call_id if isinstance(call_id, str) else ""
    return message, notes | dict.fromkeys((*found.notes, *unread(turn, _known_of_turn(role, *_OPENAI), "turn")))


_CALLING = "function_call"
"""Name of ShareGPT's role whose text is a call."""
_PLAIN = {"role", "content"}
_OPENAI = ("role", "content", "tool_calls", "function_call", "tool_call_id", "id")


def _known_of_turn(role: str, *fields: str) -> frozenset[str]:
    key = role == "assistant", fields
    if key not in _known_fields:
        _known_fields[key] = KNOWN.union(fields, REASONING if role == "assistant" else ())
    return _known_fields[key]


_known_fields: dict[tuple[bool, tuple[str, ...]], frozenset[str]] = {}  # ten at most


def _images(row: dict[str, Any]) -> list[Any]:
    """The row's `images`, or its `image`: a list, or the only one."""
    for name in ("images", "image"):
        value = row.get(name)
        if value == "":  # of a row without an image, in a file of which other rows have one
            continue
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
        refuse_half(value, name)
        raise DataError(f"{type(value).__name__}: a list is expected", field=name)
    return list(value)


def _turns(row: dict[str, Any], name: str, names: Names) -> list[dict[str, Any]]:
    """The turns in a column with the format's names."""
    value = row.get(name)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = parse_json(value, name)
    if isinstance(value, dict):
        value = _by_turn(value, name)
    turns = _list({name: value}, name)
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            refuse_half(turn, f"{name}[{i}]")
            raise DataError(f"{type(turn).__name__}: an object is expected", field=f"{name}[{i}]")
    return [names.turn(turn) for turn in turns] if names.turn_fields else turns


def _by_turn(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """One turn, or turns that are kept as a list for each field."""
    lists = [column for column in value.values() if isinstance(column, list)]
    if not lists or ("content" in value and not isinstance(value.get("role"), list)):
        return [value]
    lengths = {len(column) for column in lists}
    if len(lists) < sum(column is not None for column in value.values()) or len(lengths) != 1:
        raise DataError("fields with lists of different lengths: a list of turns is expected", field=name)
    columns = {field: column for field, column in value.items() if column is not None}
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
