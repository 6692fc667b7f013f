"""The bytes of a text that each of its tokens stands for, without the tokenizer's own offsets.

    text     Hi there</s>
    tokens   Hi | Ġthere | </s>
    bytes    Hi | " there" | </s>        ends 2, 8, 12

Encoding with offsets takes a fifth to a third longer than without. A byte-level vocabulary does not need them: if the bytes of
the tokens, joined, are the text, then each token stands for its own bytes. This is checked for every text, so nothing is assumed
about the tokenizer. Where it does not hold (a normaliser changed the text, or SentencePiece put a space in front), offsets are
used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_UNKNOWN = b"\xff"  # occurs in no UTF-8
_PROBE = "a b\n c 1"


class TokenBytes:
    """The bytes of one tokenizer's tokens. Each token is looked up once, on first use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        size = max([tokenizer.get_vocab_size(with_added_tokens=True), *(number + 1 for number in self._added)])
        self._bytes = np.full(size, None, object)
        self._lengths = np.zeros(size, np.int64)
        pipeline: Any = tokenizer
        found = pipeline.encode_batch_fast([_PROBE], add_special_tokens=False)[0].ids
        self.are_known = self.ends(np.array(found, np.int32), _PROBE) is not None
        """Whether the vocabulary is byte-level. Otherwise `ends` returns None."""

    def ends(self, ids: NDArray[np.int32], text: str) -> NDArray[np.int64] | None:
        """ids: int32[T]. Returns int64[T], each token's end in bytes of the text's UTF-8; None where they do not match."""
        try:
            found = b"".join(self._bytes[ids].tolist())
        except TypeError:  # None among them: tokens that were not looked up yet
            for number in set(ids.tolist()):
                if self._bytes[number] is None:
                    of_token = self._look_up(number)
                    self._lengths[number] = len(
                        of_token
                    )  # before the bytes: another thread may read it as soon as they are there
                    self._bytes[number] = of_token
            found = b"".join(self._bytes[ids].tolist())
        if found != text.encode():
            return None
        ends: NDArray[np.int64] = np.cumsum(self._lengths[ids])
        return ends

    def _look_up(self, number: int) -> bytes:
        content = self._added.get(number)
        if content is not None:
            return content.encode()
        letters = self._tokenizer.id_to_token(number) or ""
        try:
            return bytes(map(_BYTE_OF.__getitem__, letters)) or _UNKNOWN
        except KeyError:
            return _UNKNOWN


def _byte_letters() -> dict[str, int]:
    """Letter -> the byte that byte-level vocabularies (GPT-2 and later) write as this letter."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


_BYTE_OF = _byte_letters()
