"""Which bytes of a text each of its tokens stands for, without the tokenizer's own offsets.

    text     Hi there</s>
    tokens   Hi | Ġthere | </s>
    bytes    Hi | " there" | </s>        ends 2, 8, 12

Encoding with offsets takes a fifth to a third longer than without. A byte-level vocabulary does not need them: tokens whose bytes
give the text again, one after the other, stand for just those. That is looked at for every text, so nothing is assumed of the
tokenizer; where it is not so (a normaliser changed something, or SentencePiece put a space in front), the offsets are asked for.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer

_UNKNOWN = b"\xff"  # occurs in no UTF-8
_PROBE = "a b\n c 1"


class TokenBytes(dict[int, bytes]):
    """Of one tokenizer: id -> bytes, each looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        pipeline: Any = tokenizer
        found = pipeline.encode_batch_fast([_PROBE], add_special_tokens=False)[0].ids
        self.are_known = self.ends(found, _PROBE) is not None
        """Whether the vocabulary is byte-level; otherwise `ends` is of no use."""

    def __missing__(self, number: int) -> bytes:
        content = self._added.get(number)
        if content is not None:
            found = content.encode()
        else:
            letters = self._tokenizer.id_to_token(number) or ""
            try:
                found = bytes(map(_BYTE_OF.__getitem__, letters)) or _UNKNOWN
            except KeyError:
                found = _UNKNOWN
        self[number] = found
        return found

    def ends(self, ids: list[int], text: str) -> list[int] | None:
        """Where each token ends in the text's UTF-8, in bytes; None where the tokens' bytes are not the text."""
        pieces = list(map(self.__getitem__, ids))
        if b"".join(pieces) != text.encode():
            return None
        return list(accumulate(map(len, pieces)))


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level vocabularies (GPT-2's and all since) write for each byte, to the byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


_BYTE_OF = _byte_letters()
