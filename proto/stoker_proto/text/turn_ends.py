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
from stoker_proto.text.rows import EncodedRow
from stoker_proto.text.turns import Turn

_ASK, _SAID = Turn(role="user", text="probe"), Turn(role="assistant", text="words")
_LEARNED = Turn(role="assistant", text="words", learned=True)
_PROBES = ((_ASK, _LEARNED), (_ASK, _LEARNED, _ASK, _SAID))
"""A last turn and an earlier one: templates may end them differently."""


@dataclass(frozen=True, slots=True)
class TurnEnds:
    """What a template ends learned turns with."""

    ids: tuple[int, ...]
    """The tokens, ascending."""
    words: tuple[int, ...] = ()
    """Last learned tokens that are words, where the template has no end of a turn."""


def find_turn_ends(
    encode: Callable[[Sequence[Turn]], Sequence[EncodedRow]], is_token: Callable[[int], bool]
) -> TurnEnds:
    """From dialogues of placeholders. encode: the rows of a dialogue; is_token: whether an id is a token by itself, no text."""
    ends: set[int] = set()
    for turns in _PROBES:
        try:
            rows = encode(turns)
        except DataError:  # a template that takes no such dialogue ends no turn of one
            continue
        ends.update(int(row.input_ids[at]) for row in rows for at in last_learned(row.supervised))
    return TurnEnds(
        tuple(sorted(end for end in ends if is_token(end))), tuple(sorted(end for end in ends if not is_token(end)))
    )


def last_learned(supervised: NDArray[np.uint8]) -> list[int]:
    """The place of the last token of each run of labels.

    >>> last_learned(np.array([0, 1, 1, 0, 0, 1], np.uint8))
    [2, 5]
    """
    padded = np.append(supervised.astype(np.int8), 0)
    return np.flatnonzero(np.diff(padded) == -1).tolist()
