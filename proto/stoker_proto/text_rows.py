"""Plain text as rows: every token is a label, and what is too long for one row becomes several.

    text     ids of the text, then the end token:   a b c d e f g </s>
    rows     max_seq_len 4, with <s> in front:      <s> a b c | <s> d e f | <s> g </s>

Every row begins with the tokenizer's leading tokens (begin-of-sequence), as every text does that the model meets; they are no
labels. Where there are none, a row begins with the last token of the one before: so each token is a label once, except the
text's very first, before which nothing stands:

                                                    a b c d | d e f g | g </s>      labels: bcd, efg, </s>

A text without a token gives no row. `input_ids` are cut in the same way; leading and end tokens that they have already are not
doubled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from stoker_proto.control_tokens import ControlTokens
from stoker_proto.errors import ConfigError, DataError, RowError
from stoker_proto.ids import Ids
from stoker_proto.rendered import Rendered, Steps, run_together
from stoker_proto.rows import EncodedRow
from stoker_proto.tokenizer import TextTokenizer

Marked = tuple[str, Collection[str]]
"""A text, and the special tokens in it that are meant as such; any other is plain text."""


class TextRows:
    """Cuts texts into rows for one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer, control: ControlTokens, end_id: int, max_seq_len: int) -> None:
        self._tokenizer, self._control, self._end_id, self._max_seq_len = tokenizer, control, end_id, max_seq_len
        self._leading = np.array(tokenizer.leading, np.int32)

    def of_text(self, text: str, special_tokens: Collection[str] = ()) -> list[EncodedRow]:
        """The rows of one text; special_tokens: see `Marked`. Raises DataError."""
        [rows] = self.of_texts([(text, special_tokens)])
        if isinstance(rows, DataError):
            raise rows
        return rows

    def of_texts(self, texts: Sequence[Marked]) -> list[list[EncodedRow] | DataError]:
        """The rows of each text, or a DataError."""
        return run_together(self._tokenizer, self._control, [self._make_rows(*text) for text in texts])

    def of_ids(self, input_ids: NDArray[np.integer]) -> list[EncodedRow]:
        """The rows of int[T] ids. Raises DataError for one that the tokenizer does not have."""
        return self._rows(self._checked(input_ids))

    def count_texts(self, texts: Sequence[Marked]) -> list[tuple[int, int] | DataError]:
        """(rows, tokens in them) of each text: of what `of_texts` gives."""
        return run_together(self._tokenizer, self._control, [self._make_count(*text) for text in texts])

    def count_ids(self, input_ids: NDArray[np.integer]) -> tuple[int, int]:
        """The same of ids."""
        return self._count(len(self._checked(input_ids)))

    @property
    def _room(self) -> int:
        """Tokens that one row adds, beside what stands in front of them."""
        room = self._max_seq_len - max(len(self._leading), 1)
        if room < 1:
            raise ConfigError(f"data.max_seq_len is {self._max_seq_len}: no token of a text fits into a row")
        return room

    def _mark(self, text: str, special_tokens: Collection[str]) -> str:
        for token in special_tokens:
            if self._tokenizer.id_of(token) is None:
                raise RowError(
                    f"the dataset writes {token!r}, which is no token of this tokenizer and would be trained as letters: name "
                    "the tokenizer's own (data.options.tokens), or turn off what needs it"
                )
        return self._control.mark(text, written=special_tokens)

    def _make_rows(self, text: str, special_tokens: Collection[str]) -> Steps[list[EncodedRow]]:
        [(ids, _)] = yield [Rendered(self._mark(text, special_tokens))]
        return self._rows(ids)

    def _make_count(self, text: str, special_tokens: Collection[str]) -> Steps[tuple[int, int]]:
        [(ids, _)] = yield [Rendered(self._mark(text, special_tokens))]
        return self._count(len(ids))

    def _checked(self, input_ids: NDArray[np.integer]) -> Ids:
        """Without leading and end tokens."""
        ids = np.asarray(input_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(
                f"input_ids of shape {list(ids.shape)} and type {ids.dtype}: whole numbers [T] are expected"
            )
        wrong = ids[(ids < 0) | (ids >= self._tokenizer.size)]
        if len(wrong):
            raise DataError(f"input_ids hold {int(wrong[0])}: the tokenizer has ids 0-{self._tokenizer.size - 1}")
        ids = ids.astype(np.int32)
        leading = self._leading
        if len(leading) and np.array_equal(ids[: len(leading)], leading):
            ids = ids[len(leading) :]
        return ids[:-1] if len(ids) and ids[-1] == self._end_id else ids

    def _count(self, num_ids: int) -> tuple[int, int]:
        """Of so many ids; the end token is one more."""
        if num_ids == 0:
            return 0, 0
        added = num_ids + bool(len(self._leading))  # without leading tokens the first one stands in front of the others
        rows = -(-added // self._room)
        return rows, added + rows * max(len(self._leading), 1)

    def _rows(self, ids: Ids) -> list[EncodedRow]:
        if len(ids) == 0:
            return []
        ids = np.append(ids, np.int32(self._end_id))
        context = 0 if len(self._leading) else 1  # tokens of the text in front of what a row adds
        rows = []
        for start in range(context, len(ids), self._room):
            row = np.concatenate((self._leading, ids[start - context : start + self._room]))
            supervised = np.ones(len(row), np.uint8)
            supervised[: len(self._leading) + context] = 0
            rows.append(EncodedRow(row, supervised))
        return rows
