"""`text`: plain language modelling on a column of tables, on text files, or on token ids.

    {"text": "Once upon a time ..."}            a column of tables: its texts
    {"input_ids": [1, 7454, 2402]}              the same column with lists, or `input_ids`: token ids
    {"input_ids": [...], "labels": [...]}       with what is learned of them, see `token_rows`
    story.txt  notes.md                         text files: whole, or by lines or paragraphs
    train.bin  tokens.npy                       token ids in rows of `record_tokens`

Token ids are used as they are: no token is added before or after them. The first token of a record is no label.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from loader_service.sources.base import Sample
from loader_service.sources.fields import PREFERENCES, refuse_preferences, unread
from loader_service.sources.half_characters import refuse_half
from loader_service.sources.options import read_options
from loader_service.sources.tables.dataset import TableDataset
from loader_service.sources.tables.plain_text import PlainText
from loader_service.sources.tables.table import PACKED_SUFFIXES, TABLE_PATTERNS, Table, plain_suffix
from loader_service.sources.tables.token_file import COLUMN, TOKEN_SUFFIXES, TokenFile, refuse_wider
from loader_service.sources.token_rows import FIELDS, token_row
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, DataError

_COLUMN = "text"
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """`data.options` of this dataset."""

    column: str = _COLUMN
    """Of tables: texts, or lists of token ids. Rows without it are read from `input_ids`."""
    split: Literal["file", "lines", "paragraphs"] = "file"
    """What one record of a text file is; blank lines separate paragraphs."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Of the numbers in .bin files."""
    record_tokens: int | None = None
    """Tokens in a record of .bin and .npy files; they need it."""
    validate: bool = False
    """Parse and check every row in loader-prepare, not only when it is read."""
    unpack_parquet: bool = False
    """Keep the needed columns of parquet files unpacked in the cache folder: quick random reads for room on the disk."""


class TextDataset(TableDataset):
    """Texts, or token ids."""

    shard_patterns: ClassVar[tuple[str, ...]] = (
        *TABLE_PATTERNS,
        *(f"*{suffix}{packed}" for suffix in (*TEXT_SUFFIXES, *TOKEN_SUFFIXES) for packed in ("", *PACKED_SUFFIXES)),
    )

    same_format: ClassVar[tuple[tuple[str, ...], ...]] = (*TableDataset.same_format, TEXT_SUFFIXES)

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.options = read_options(TextOptions, config.options, "text")
        tokens = self.options.record_tokens
        if tokens is not None and not 2 <= tokens <= config.max_seq_len:
            raise ConfigError(
                f"data.options.record_tokens is {tokens}: from 2 to data.max_seq_len ({config.max_seq_len}) is expected"
            )
        self.validate, self.unpack_parquet = self.options.validate, self.options.unpack_parquet

    def columns(self) -> tuple[str, ...]:
        """The one, and those of token ids; preferences, to be refused."""
        return tuple(dict.fromkeys((self.options.column, *FIELDS, *PREFERENCES)))

    def needed_columns(self) -> tuple[str, ...]:
        """That of the options; by default `input_ids` will do as well."""
        return (_COLUMN, COLUMN) if self.options.column == _COLUMN else (self.options.column,)

    def open_table(self, path: Path, shard: Path) -> Table:
        """Text and token files are tables of one column."""
        suffix = plain_suffix(shard.name)
        if suffix in TEXT_SUFFIXES:
            return PlainText(path, self.options.column, self.options.split)
        if suffix in TOKEN_SUFFIXES:
            if self.options.record_tokens is None:
                raise ConfigError(
                    f"{shard}: data.options.record_tokens is not set; say how many tokens of a {suffix} file are one record"
                )
            if suffix == ".bin" and "dtype" not in self.config.options:
                refuse_wider(path)
            return TokenFile(path, self.options.dtype, self.options.record_tokens, is_npy=suffix == ".npy")
        return super().open_table(path, shard)

    def sample(self, row: dict[str, Any], shard: Path, kind: str) -> Sample:
        """The column's text or tokens."""
        column = self.options.column
        refuse_preferences(row, (column,))
        name = self._name_in(row)
        value = row.get(name)
        if isinstance(value, str):
            if not value.strip():
                raise DataError("empty: there is nothing to learn", field=name)
            return Sample(text=value, notes=self.unread(row, kind))
        if isinstance(value, list | np.ndarray):
            ids, labels = token_row(row, name)
            return Sample(input_ids=ids, labels=labels, notes=self.unread(row, kind))
        refuse_half(value, name)
        shown = ", ".join(map(str, row)) or "none"
        raise DataError(
            f"a text or a list of token ids is expected, not {type(value).__name__} (columns: {shown}): name the right one in "
            "data.options.column",
            field=name,
        )

    def unread(self, row: dict[str, Any], kind: str) -> tuple[str, ...]:
        """All fields but the column's; those of token ids have more."""
        name = self._name_in(row)
        return unread(row, (name,) if isinstance(row.get(name), str) else (name, *FIELDS))

    def _name_in(self, row: dict[str, Any]) -> str:
        """The field that holds the row's text or token ids."""
        column = self.options.column
        is_default = column == _COLUMN and row.get(column) is None and row.get(COLUMN) is not None
        return COLUMN if is_default or isinstance(row.get(COLUMN), np.ndarray) else column
