"""Plain text as rows: every token is a label, and a text that is too long for one row becomes several rows.

    text     ids of the text, then the end token:   a b c d e f g </s>
    rows     max_seq_len 4, with <s> in front:      <s> a b c | <s> d e f | <s> g </s>

Every row begins with the tokenizer's leading tokens (begin-of-sequence), like every text that the model sees; they are not
labels. A tokenizer may have none: then a row begins with the last token of the row before. So each token is a label once, except
the first token of the text, which has no context:

                                                    a b c d | d e f g | g </s>      labels: bcd, efg, </s>

A text without tokens gives no row. `input_ids` are used unchanged, because they may be a piece of a stream: an end token in them
is learned, and none is added. Rows begin with the leading tokens if the ids do; otherwise they overlap by one token. So a piece
of `max_seq_len` ids is one row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError, DataError, RowError
from stoker_proto.text.control_tokens import ControlTokens
from stoker_proto.text.labelled_rows import checked_ids
from stoker_proto.text.rendered import Rendered, TextJob, run_together
from stoker_proto.text.rows import EncodedRow
from stoker_proto.text.tokenizer import Ids, TextTokenizer

Marked = tuple[str, Collection[str]]
"""(a text, the special tokens that the dataset wrote into it). Any other special token in it is plain text."""


ROWS_VERSION = 2
"""Version of the rows. Raise it when the same text, ids or turns give other rows: earlier counts are then invalid."""


class TextRows:
    """Divides texts into rows, for one tokenizer."""

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
        """The rows of each text, or the DataError that it causes."""
        return run_together(self._tokenizer, self._control, [self._make_rows(*text) for text in texts])

    def of_ids(self, input_ids: NDArray[np.integer]) -> list[EncodedRow]:
        """The rows of ids int[T]. Raises DataError for an id that the tokenizer does not have."""
        return self._rows(*self._parted(input_ids))

    def count_texts(self, texts: Sequence[Marked]) -> list[tuple[int, int] | DataError]:
        """(number of rows, number of tokens in them) of each text, as `of_texts` makes them, or a DataError."""
        return run_together(self._tokenizer, self._control, [self._make_count(*text) for text in texts])

    def _room(self, num_leading: int) -> int:
        """Tokens that one row adds to those before it. Raises ConfigError where there is no room for any."""
        room = self._max_seq_len - max(num_leading, 1)
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

    def _make_rows(self, text: str, special_tokens: Collection[str]) -> TextJob[list[EncodedRow]]:
        [(ids, _)] = yield [Rendered(self._mark(text, special_tokens))]
        return self._rows(np.append(ids, np.int32(self._end_id)), self._leading) if len(ids) else []

    def _make_count(self, text: str, special_tokens: Collection[str]) -> TextJob[tuple[int, int]]:
        [(ids, _)] = yield [Rendered(self._mark(text, special_tokens))]
        return self._count(len(ids) + 1, len(self._leading)) if len(ids) else (0, 0)

    def _parted(self, input_ids: NDArray[np.integer]) -> tuple[Ids, Ids]:
        """(the ids that rows are made of, the leading tokens of each row). No leading tokens where the ids begin without them."""
        ids = checked_ids(input_ids, self._tokenizer.size)
        leading = self._leading
        if len(leading) == 0 or not np.array_equal(ids[: len(leading)], leading):
            return ids, self._leading[:0]
        ids = ids[len(leading) :]
        return (ids[:0] if len(ids) == 1 and ids[0] == self._end_id else ids), leading  # an empty text

    def _count(self, num_ids: int, num_leading: int) -> tuple[int, int]:
        added = num_ids - (num_leading == 0)  # without leading tokens the first token is context only
        if added < 1:
            return 0, 0
        rows = -(-added // self._room(num_leading))
        return rows, added + rows * max(num_leading, 1)

    def _rows(self, ids: Ids, leading: Ids) -> list[EncodedRow]:
        context = 0 if len(leading) else 1  # ids before those that a row adds
        room = self._room(len(leading))
        rows = []
        for start in range(context, len(ids), room):
            row = np.concatenate((leading, ids[start - context : start + room]))
            supervised = np.ones(len(row), np.uint8)
            supervised[: len(leading) + context] = 0
            rows.append(EncodedRow(row, supervised))
        return rows
