"""Text with learned spans -> token ids and labels. One call of the tokenizer encodes the texts of many rows."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from stoker_proto.errors import DataError
from stoker_proto.text.control_tokens import ControlTokens, is_action_token, is_marked
from stoker_proto.text.tokenizer import Ids, TextTokenizer, int32_array

CharSpans = Sequence[tuple[int, int]]
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to be tokenised, in which control tokens from data are marked (see `control_tokens`)."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    """Characters [start, end) that are learned, ascending."""


Labelled = tuple[Ids, NDArray[np.uint8]]
"""(int32[T] ids, uint8[T] labels) of a text."""

TextJob = Generator[Sequence[Rendered], Sequence[Labelled], R]
"""Makes an R from texts: it yields the texts to tokenise, receives them back as ids and labels, and may yield more."""


def run_together(tokenizer: TextTokenizer, control: ControlTokens, jobs: Sequence[TextJob[R]]) -> list[R | DataError]:
    """The result of each job, or the DataError that it raised.

    The texts of all jobs are tokenised in one call. So the interpreter lock is released and taken once, not once per text, which
    disturbs other threads less.
    """
    results: dict[int, R | DataError] = {}
    asked: dict[int, Sequence[Rendered]] = {}

    def resume(number: int, answers: Sequence[Labelled] | None) -> None:
        try:
            asked[number] = next(jobs[number]) if answers is None else jobs[number].send(answers)
        except StopIteration as end:
            results[number] = end.value
        except DataError as error:
            results[number] = error

    for number in range(len(jobs)):
        resume(number, None)
    while asked:
        waiting, asked = asked, {}
        encoded = iter(encode_all(tokenizer, control, [one for texts in waiting.values() for one in texts]))
        for number, texts in waiting.items():
            answers: list[Labelled] = []
            for answer in [next(encoded) for _ in texts]:
                if isinstance(answer, DataError):
                    results[number] = answer
                    break
                answers.append(answer)
            else:
                resume(number, answers)
    return [results[number] for number in range(len(jobs))]


def encode_all(
    tokenizer: TextTokenizer, control: ControlTokens, rendered: Sequence[Rendered]
) -> list[Labelled | DataError]:
    """The ids and labels of each text. A token that contains a learned character is a label.

    Text with marks is tokenised piece by piece, and marked pieces as plain text. The result is a DataError where that is
    impossible.
    """
    in_batch = [not is_marked(one.text) and not _needs_offsets(tokenizer, one) for one in rendered]
    batch = [one.text for one, is_in in zip(rendered, in_batch, strict=True) if is_in]
    encoded = iter(tokenizer.encode_batch(batch) if batch else ())
    result: list[Labelled | DataError] = []
    for one, is_in in zip(rendered, in_batch, strict=True):
        if is_in:
            ids = next(encoded)
            result.append((ids, _labels(tokenizer, ids, None, one.spans, one.text)))
        elif is_marked(one.text):
            try:
                result.append(_encode_marked(tokenizer, control, one))
            except DataError as error:
                result.append(error)
        else:
            encoding = tokenizer.encoding(one.text)
            ids = int32_array(encoding.ids)
            result.append((ids, _labels(tokenizer, ids, encoding, one.spans, one.text)))
    return result


def _needs_offsets(tokenizer: TextTokenizer, one: Rendered) -> bool:
    return bool(one.spans) and not _is_whole(one.spans, one.text) and not tokenizer.token_bytes.are_known


def _is_whole(spans: CharSpans, text: str) -> bool:
    return len(spans) == 1 and spans[0] == (0, len(text))


def _encode_marked(tokenizer: TextTokenizer, control: ControlTokens, rendered: Rendered) -> Labelled:
    ids: list[Ids] = []
    labels: list[NDArray[np.uint8]] = []
    for start, text, is_plain in control.pieces(rendered.text):
        inside = [(max(a - start, 0), min(b - start, len(text))) for a, b in rendered.spans]
        inside = [(a, b) for a, b in inside if a < b]
        if is_plain:
            found = int32_array(encode_as_text(tokenizer, text))
            labels.append(np.full(len(found), bool(inside), np.uint8))
        else:
            opening = _OPENING if ids else ""
            encoding = tokenizer.encoding(opening + text)
            drop = _num_opening(tokenizer, encoding.ids) if opening else 0
            if opening and not drop:
                encoding, opening = tokenizer.encoding(text), ""
            whole = int32_array(encoding.ids)
            found = whole[drop:]
            shifted = [(a + len(opening), b + len(opening)) for a, b in inside]
            labels.append(_labels(tokenizer, whole, encoding, shifted, opening + text)[drop:])
        ids.append(found)
    return np.concatenate(ids), np.concatenate(labels)


_OPENING = "\n"
"""Put before a piece from the middle of a text, because tokenizers put a space before the beginning of a text."""


def encode_as_text(tokenizer: TextTokenizer, word: str) -> list[int]:
    """The ids of a control token as plain text. Raises DataError where they are the ids that the dialogue itself writes."""
    if tokenizer.id_of(word) is None and not is_action_token(word):
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
    """The number of ids that belong to `_OPENING`; 0 where it has no separate ids."""
    opening = tokenizer.encode(_OPENING)
    return len(opening) if ids[: len(opening)] == opening else 0


def _labels(
    tokenizer: TextTokenizer, ids: Ids, encoding: Encoding | None, spans: CharSpans, text: str
) -> NDArray[np.uint8]:
    """uint8[T]: 1 for each token that contains a character of the spans."""
    labels = np.zeros(len(ids), np.uint8)
    if not spans:
        return labels
    if _is_whole(spans, text):  # includes a token without characters, with which some tokenizers begin a text
        labels.fill(1)
        return labels
    ends = tokenizer.token_bytes.ends(ids, text) if tokenizer.token_bytes.are_known else None
    if ends is None:
        encoding = encoding or tokenizer.encoding(text)
        places = [_tokens_of(encoding, start, end, len(text)) for start, end in spans]
    else:
        if not text.isascii():
            spans = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
        # From the first token that ends after the span's start to the token that contains its last byte.
        places = [(int(ends.searchsorted(a, "right")), int(ends.searchsorted(b)) + 1) for a, b in spans]
    for first, after in places:
        labels[first:after] = 1
    return labels


def _tokens_of(encoding: Encoding, start: int, end: int, length: int) -> tuple[int, int]:
    """[first, after) of the tokens that contain a character of [start, end), in a text of `length` characters."""
    first = _token_at(encoding, start, end)
    if first is None:
        return 0, 0
    after = _token_at(encoding, end, length)
    if after is None:
        return first, len(encoding)
    chars = encoding.token_to_chars(after)
    return first, after + (chars is not None and chars[0] < end)


def _token_at(encoding: Encoding, char: int, stop: int) -> int | None:
    """The first token that contains a character of [char, stop), some of which a normaliser may have dropped."""
    for position in range(char, stop):
        token: int | None = encoding.char_to_token(position)
        if token is not None:
            return token
    return None
