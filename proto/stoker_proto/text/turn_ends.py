"""At which tokens learned turns end: the exported model must stop there.

<|im_start|>assistant\\nHello<|im_end|>\\n        ends with <|im_end|>, while the base model's eos is <|endoftext|>
<|assistant|>\\nHello<|user|>                    has no end of its own: the last learned token is a word
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import DataError
from stoker_proto.text.functions import Tools
from stoker_proto.text.rows import EncodedRow
from stoker_proto.text.turns import Call, Turn

_ASK, _SAID = Turn(role="user", text="probe"), Turn(role="assistant", text="words")
_LEARNED = Turn(role="assistant", text="words", learned=True)
_PROBES = ((_ASK, _LEARNED), (_ASK, _LEARNED, _ASK, _SAID))
"""A last turn and an earlier one: templates may end them differently."""
_CALLING = Turn(role="assistant", text="", calls=(Call("probe", {"word": "words"}, "probe00001"),), learned=True)
_ANSWERED = Turn(role="tool", text="words", call_id="probe00001")
_CALLS = ((_ASK, _CALLING), (_ASK, _CALLING, _ANSWERED, _LEARNED))
"""The same of a turn that calls a function: gpt-oss ends it with <|call|>, Llama 3.1 with its own tools with <|eom_id|>."""
_TOOLS: Tools = (
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "words",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "words"}},
                "required": ["word"],
            },
        },
    },
)
"""What these turns may call."""


@dataclass(frozen=True, slots=True)
class TurnEnds:
    """What a template ends learned turns with."""

    ids: tuple[int, ...]
    """The tokens, ascending."""
    words: tuple[int, ...] = ()
    """Last learned tokens that are words, where the template has no end of a turn."""


def find_turn_ends(
    encode: Callable[[Sequence[Turn], Tools], Sequence[EncodedRow]], is_token: Callable[[int], bool]
) -> TurnEnds:
    """From dialogues of placeholders. encode: the rows of a dialogue; is_token: whether an id is a token by itself, no text."""

    def ends_of(probes: Sequence[Sequence[Turn]], tools: Tools) -> set[int]:
        ends: set[int] = set()
        for turns in probes:
            try:
                rows = encode(turns, tools)
            except DataError:  # a template that takes no such dialogue ends no turn of one
                continue
            ends.update(int(row.input_ids[at]) for row in rows for at in last_learned(row.supervised))
        return ends

    ends = ends_of(_PROBES, ())
    words = tuple(sorted(end for end in ends if not is_token(end)))
    if (
        not words
    ):  # else the template has no end of a turn, and what a call ends with (GLM: </tool_call>) is none either
        ends |= {end for end in ends_of(_CALLS, _TOOLS) if is_token(end)}
    return TurnEnds(tuple(sorted(end for end in ends if is_token(end))), words)


def last_learned(supervised: NDArray[np.uint8]) -> list[int]:
    """The place of the last token of each run of labels.

    >>> last_learned(np.array([0, 1, 1, 0, 0, 1], np.uint8))
    [2, 5]
    """
    padded = np.append(supervised.astype(np.int8), 0)
    return np.flatnonzero(np.diff(padded) == -1).tolist()
