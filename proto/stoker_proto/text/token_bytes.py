"""Which bytes of a text each of its tokens stands for, without the tokenizer's own offsets.

    text     Hi there</s>
    tokens   Hi | Ġthere | </s>
    bytes    Hi | " there" | </s>        ends 2, 8, 12

Encoding with offsets takes a fifth to a third longer than without. A byte-level vocabulary does not need them: tokens whose bytes
give the text again, one after the other, stand for just those. That is looked at for every text, so nothing is assumed of the
tokenizer; where it is not so (a normaliser changed something, or SentencePiece put a space in front), the offsets are asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_UNKNOWN = b"\xff"  # occurs in no UTF-8
_PROBE = "a b\n c 1"


class TokenBytes:
    """Of one tokenizer; each token is looked up once, when it is first met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        size = max([tokenizer.get_vocab_size(with_added_tokens=True), *(number + 1 for number in self._added)])
        self._bytes = np.full(size, None, object)
        self._lengths = np.zeros(size, np.int64)
        pipeline: Any = tokenizer
        found = pipeline.encode_batch_fast([_PROBE], add_special_tokens=False)[0].ids
        self.are_known = self.ends(np.array(found, np.int32), _PROBE) is not None
        """Whether the vocabulary is byte-level; otherwise `ends` is of no use."""

    def ends(self, ids: NDArray[np.int32], text: str) -> NDArray[np.int64] | None:
        """int64[T]: where each token ends in the text's UTF-8, in bytes; None where the tokens' bytes are not the text."""
        try:
            found = b"".join(self._bytes[ids].tolist())
        except TypeError:  # None among them: tokens that were not met before
            for number in set(ids.tolist()):
                if self._bytes[number] is None:
                    of_token = self._look_up(number)
                    self._lengths[number] = len(
                        of_token
                    )  # first: another thread may read it as soon as the bytes are there
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
    """The letter that byte-level vocabularies (GPT-2's and all since) write for each byte, to the byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


_BYTE_OF = _byte_letters()
