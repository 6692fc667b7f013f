"""The turns of a dialogue as they are in the data, and the places of its images.

    Turn("user", "<image>\\nWhat is this?"), Turn("assistant", "A red cube.", learned=True)

`<image>` in a turn of the user or of a tool is the place of an image, if there are as many of them as images. The template writes
the white space around it. Without any `<image>`, all images come before the first user turn. In other turns it is plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stoker_proto.errors import DataError
from stoker_proto.text.control_tokens import ControlTokens

IMAGE = "<image>"
IMAGE_ROLES = ("user", "tool")
"""Roles whose turns may contain images."""

Parts = tuple[str | None, ...]
"""A turn's text, split at its images. None stands for an image."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function by the assistant."""

    name: str
    arguments: Any
    """JSON, usually an object."""
    id: str = ""
    """What the tool's turn refers to; "": the data has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant", "tool"]
    text: str
    learned: bool = False
    """Whether its text, and the token that ends it, are labels. Either only turns of the assistant are learned, or all turns."""
    reasoning: str | None = None
    """What the assistant thinks before `text`, where the data keeps it apart. A chat template writes it its own way; a template
    without a place for it gets it before the text, as <think>. A dialogue whose learned reasoning is left out is refused."""
    calls: tuple[Call, ...] = ()
    """Functions that the assistant calls after `text`."""
    call_id: str = ""
    """Of a tool's turn: the call that it answers; "": the data does not say."""


def place_images(turns: Sequence[Turn], num_images: int) -> list[Parts]:
    """Each turn's parts. Raises DataError where the number of `<image>` fits neither rule of the module.

    >>> place_images([Turn(role="user", text="<image>\\nWhat is this?")], 1)
    [(None, 'What is this?')]
    """
    if num_images == 0:
        return [(turn.text,) for turn in turns]
    num_marks = sum(turn.text.count(IMAGE) for turn in turns if turn.role in IMAGE_ROLES)
    if num_marks == num_images:
        return [_cut(turn.text) if turn.role in IMAGE_ROLES else (turn.text,) for turn in turns]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if num_marks or first is None:
        raise DataError(
            f"a dialogue of {num_images} images, and {num_marks} times {IMAGE!r} in the turns of user and tools: as many, or "
            "none, which puts them in front of the user's first one"
        )
    return [((None,) * num_images if i == first else ()) + (turn.text,) for i, turn in enumerate(turns)]


def mark_parts(turn: Turn, parts: Parts, control: ControlTokens) -> Parts:
    """The parts with their control tokens marked."""
    of_assistant = turn.role == "assistant"
    return tuple(None if part is None else control.mark(part, of_assistant=of_assistant) for part in parts)


def is_plain(turns: Sequence[Turn]) -> bool:
    """Whether the turns are text only, without reasoning and calls."""
    for turn in turns:  # noqa: SIM110 - a generator takes three times as long
        if turn.reasoning or turn.calls:
            return False
    return True


def is_learned_whole(turns: Sequence[Turn]) -> bool:
    """Whether every token of the dialogue is a label, not only the assistant's text.

    Raises DataError where a turn of another role is learned and some turn is not: the text between two turns belongs to neither.
    """
    others = [number for number, turn in enumerate(turns) if turn.learned and turn.role != "assistant"]
    if not others:
        return False
    for number, turn in enumerate(turns):
        if not turn.learned:
            raise DataError(
                f"turn {others[0]} is the {turns[others[0]].role}'s and learned, and turn {number} is not: learn all turns, or "
                "only the assistant's"
            )
    return True


def check_turns(turns: Sequence[Turn]) -> None:
    """Raises DataError where no turn is learned."""
    if not any(turn.learned for turn in turns):
        raise DataError(f"none of the {len(turns)} turns is learned: at least one of the assistant's is expected")


def _cut(text: str) -> Parts:
    parts: list[str | None] = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            parts.append(None)
        if text := piece.strip():
            parts.append(text)
    return tuple(parts)
