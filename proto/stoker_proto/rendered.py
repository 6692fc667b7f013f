"""Text of which some characters are learned -> token ids and labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from stoker_proto.control_tokens import ACTION_TOKEN, ControlTokens, is_marked
from stoker_proto.errors import DataError
from stoker_proto.tokenizer import TextTokenizer

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A whole dialogue as text, control tokens that stand in its data marked (see `control_tokens`)."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters [start, end) that are learned, ascending."""


def encode_rendered(
    tokenizer: TextTokenizer, control: ControlTokens, rendered: Rendered
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """(int32[T] ids, uint8[T] labels): the text is tokenised once, as a whole; a token that holds a learned character is a label.

    Text with marks is tokenised piece by piece, what is marked as plain text.
    """
    if not is_marked(rendered.text):
        encoding = tokenizer.encoding(rendered.text)
        supervised = np.zeros(len(encoding), np.uint8)
        _label(encoding, rendered.spans, len(rendered.text), supervised)
        return np.array(encoding.ids, np.int32), supervised
    ids: list[int] = []
    labels: list[NDArray[np.uint8]] = []
    for start, text, is_plain in control.pieces(rendered.text):
        inside = [(max(a - start, 0), min(b - start, len(text))) for a, b in rendered.spans]
        inside = [(a, b) for a, b in inside if a < b]
        if is_plain:
            found = encode_as_text(tokenizer, text)
            labels.append(np.full(len(found), bool(inside), np.uint8))
        else:
            opening = _OPENING if ids else ""
            encoding = tokenizer.encoding(opening + text)
            drop = _num_opening(tokenizer, encoding.ids) if opening else 0
            if opening and not drop:
                encoding, opening = tokenizer.encoding(text), ""
            found = encoding.ids[drop:]
            supervised = np.zeros(len(encoding), np.uint8)
            shifted = [(a + len(opening), b + len(opening)) for a, b in inside]
            _label(encoding, shifted, len(opening) + len(text), supervised)
            labels.append(supervised[drop:])
        ids += found
    return np.array(ids, np.int32), np.concatenate([*labels, np.zeros(0, np.uint8)])


_OPENING = "\n"
"""In front of a piece from the middle: tokenizers put a space in front of what begins a text, and this is no beginning."""


def encode_as_text(tokenizer: TextTokenizer, word: str) -> list[int]:
    """The ids of a control token's letters. Raises DataError where that is what the dialogue writes, too."""
    if tokenizer.id_of(word) is None and not re.fullmatch(ACTION_TOKEN, word):
        raise DataError(
            f"the text holds {word!r}, which opens a turn of this dialogue and is no token of the tokenizer, so the two could "
            "not be told apart: take it out"
        )
    ids = tokenizer.encode_without_added(_OPENING + word)
    drop = _num_opening(tokenizer, ids)
    ids = ids[drop:] if drop else tokenizer.encode_without_added(word)
    if tokenizer.id_of(word) in ids or not ids:
        raise DataError(f"the text holds {word!r}, which this tokenizer can write only as the token: take it out")
    return ids


def _num_opening(tokenizer: TextTokenizer, ids: list[int]) -> int:
    """How many of the ids are those of `_OPENING`; 0 where it has none of its own."""
    opening = tokenizer.encode(_OPENING)
    return len(opening) if ids[: len(opening)] == opening else 0


def _label(encoding: Encoding, spans: Spans, length: int, supervised: NDArray[np.uint8]) -> None:
    """Set 1 for the tokens that hold a character of the spans of a text of `length` characters."""
    for start, end in spans:
        first = _token_at(encoding, start, end)
        if first is None:
            continue
        after = _token_at(encoding, end, length)
        if after is None:
            after = len(encoding)
        else:
            chars = encoding.token_to_chars(after)
            after += chars is not None and chars[0] < end
        supervised[first:after] = 1


def _token_at(encoding: Encoding, char: int, stop: int) -> int | None:
    """The first token that holds a character of [char, stop): a normaliser may have dropped some of them."""
    for position in range(char, stop):
        token: int | None = encoding.char_to_token(position)
        if token is not None:
            return token
    return None
