"""Text of which some characters are learned -> token ids and labels."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
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
    spans: tuple[tuple[int, int], ...] = ()
    """Characters [start, end) that are learned, ascending."""


def encode_rendered(
    tokenizer: TextTokenizer, control: ControlTokens, rendered: Rendered
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """(int32[T] ids, uint8[T] labels): the text is tokenised once, as a whole; a token that holds a learned character is a label.

    Text with marks is tokenised piece by piece, what is marked as plain text.
    """
    ids, labels = encode_all(tokenizer, control, [rendered])[0]
    return np.array(ids, np.int32), np.frombuffer(labels, np.uint8)


def encode_all(
    tokenizer: TextTokenizer, control: ControlTokens, rendered: Sequence[Rendered]
) -> list[tuple[list[int], bytearray]]:
    """(ids, labels) of several texts, each tokenised by itself; quicker than one by one."""
    texts = [one.text for one in rendered if not is_marked(one.text)]
    encoded = iter(_encode(tokenizer, texts, with_labels=any(one.spans for one in rendered)))
    result = []
    for one in rendered:
        if is_marked(one.text):
            result.append(_encode_marked(tokenizer, control, one))
        else:
            ids, encoding = next(encoded)
            result.append((ids, _labels(tokenizer, ids, encoding, one.spans, one.text)))
    return result


def _encode(
    tokenizer: TextTokenizer, texts: list[str], *, with_labels: bool
) -> list[tuple[list[int], Encoding | None]]:
    """The ids of each text; with offsets where the labels need them."""
    if not with_labels or tokenizer.token_bytes.are_known:
        return [(ids, None) for ids in tokenizer.encode_batch(texts)]
    encodings = [tokenizer.encoding(text) for text in texts]
    return [(encoding.ids, encoding) for encoding in encodings]


def _encode_marked(tokenizer: TextTokenizer, control: ControlTokens, rendered: Rendered) -> tuple[list[int], bytearray]:
    ids: list[int] = []
    labels = bytearray()
    for start, text, is_plain in control.pieces(rendered.text):
        inside = [(max(a - start, 0), min(b - start, len(text))) for a, b in rendered.spans]
        inside = [(a, b) for a, b in inside if a < b]
        if is_plain:
            found = encode_as_text(tokenizer, text)
            labels += bytes([bool(inside)]) * len(found)
        else:
            opening = _OPENING if ids else ""
            encoding = tokenizer.encoding(opening + text)
            drop = _num_opening(tokenizer, encoding.ids) if opening else 0
            if opening and not drop:
                encoding, opening = tokenizer.encoding(text), ""
            found = encoding.ids[drop:]
            shifted = [(a + len(opening), b + len(opening)) for a, b in inside]
            labels += _labels(tokenizer, encoding.ids, encoding, shifted, opening + text)[drop:]
        ids += found
    return ids, labels


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


def _labels(tokenizer: TextTokenizer, ids: list[int], encoding: Encoding | None, spans: Spans, text: str) -> bytearray:
    """1 for each token that holds a character of the spans."""
    labels = bytearray(len(ids))
    if not spans:
        return labels
    ends = tokenizer.token_bytes.ends(ids, text) if tokenizer.token_bytes.are_known else None
    if ends is None:
        encoding = encoding or tokenizer.encoding(text)
        places = [_tokens_of(encoding, start, end, len(text)) for start, end in spans]
    else:
        if not text.isascii():
            spans = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
        # The first token that ends behind the span's beginning, to the one in which its last byte lies.
        places = [(bisect_right(ends, start), bisect_left(ends, end) + 1) for start, end in spans]
    for first, after in places:
        labels[first:after] = b"\x01" * (after - first)
    return labels


def _tokens_of(encoding: Encoding, start: int, end: int, length: int) -> tuple[int, int]:
    """[first, after) of the tokens that hold a character of [start, end) of a text of `length` characters."""
    first = _token_at(encoding, start, end)
    if first is None:
        return 0, 0
    after = _token_at(encoding, end, length)
    if after is None:
        return first, len(encoding)
    chars = encoding.token_to_chars(after)
    return first, after + (chars is not None and chars[0] < end)


def _token_at(encoding: Encoding, char: int, stop: int) -> int | None:
    """The first token that holds a character of [char, stop): a normaliser may have dropped some of them."""
    for position in range(char, stop):
        token: int | None = encoding.char_to_token(position)
        if token is not None:
            return token
    return None
