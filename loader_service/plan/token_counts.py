"""Lengths in tokens of an entry's samples, from two columns of the manifest. Only text has them, where the scan counted tokens.

    num_samples 3, num_tokens 5000, max_seq_len 2048   ->   samples of 2048, 2048 and 904 tokens

Where a chat template divides dialogues, the manifest has the length of each sample, and these are used.

A record of one sample is that sample, cut at `max_seq_len`. A record that the scan found bad (policy `skip`) has no count: a
filler of one token takes its place.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader_service.manifest import EntryManifest
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, ManifestError

logger = logging.getLogger(__name__)

FILLER_TOKENS = 1
"""Length of the row, or the part of a row, that stands for a bad sample."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenCounts:
    """The lengths that a plan of text rows is made of. R records."""

    num_samples: NDArray[np.uint32]  # [R]
    num_tokens: NDArray[np.uint32]  # [R], of all samples of the record
    max_seq_len: int
    row_starts: NDArray[np.int64] | None = None  # [R], as in the manifest
    row_tokens: NDArray[np.uint32] | None = None  # [S]

    @classmethod
    def of(cls, manifest: EntryManifest, data: DataConfig) -> TokenCounts:
        """The counts of an entry that `check_token_counts` has accepted."""
        return cls(
            num_samples=manifest.num_samples,
            num_tokens=manifest.num_tokens,
            max_seq_len=data.max_seq_len,
            row_starts=manifest.row_starts,
            row_tokens=manifest.row_tokens,
        )

    def of_record(self, record: int) -> list[int]:
        """Tokens of each sample of one record."""
        samples, tokens, most = int(self.num_samples[record]), int(self.num_tokens[record]), self.max_seq_len
        if self.row_tokens is not None and self.row_starts is not None:
            start = int(self.row_starts[record])
            return [int(length) for length in self.row_tokens[start : start + samples]]
        last = min(max(tokens - (samples - 1) * most, FILLER_TOKENS), most)
        return [*[most] * (samples - 1), last] if samples else []

    @property
    def total_samples(self) -> int:
        """Samples of the entry."""
        return int(self.num_samples.sum(dtype=np.int64))

    @property
    def total_tokens(self) -> int:
        """Tokens of the entry, with those that are cut off."""
        return int(self.num_tokens.sum(dtype=np.int64))

    def last_lengths(self, records: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """uint32[n]: tokens of each record's last sample, 1 to max_seq_len; 0 where it has no sample. The others are full."""
        samples = np.asarray(self.num_samples[records]).astype(np.int64)
        last = np.asarray(self.num_tokens[records]) - np.maximum(samples - 1, 0) * self.max_seq_len
        return np.where(samples > 0, np.clip(last, FILLER_TOKENS, self.max_seq_len), 0).astype(np.uint32)

    def lengths(self, records: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """uint32[S]: tokens of each sample of each record, record after record."""
        samples = np.asarray(self.num_samples[records]).astype(np.int64)
        if self.row_tokens is not None and self.row_starts is not None:
            before = np.cumsum(samples) - samples
            places = np.repeat(np.asarray(self.row_starts[records]) - before, samples) + np.arange(int(samples.sum()))
            return np.asarray(self.row_tokens[places])
        lengths = np.full(int(samples.sum()), self.max_seq_len, np.uint32)
        lengths[np.cumsum(samples)[samples > 0] - 1] = self.last_lengths(records)[samples > 0]
        return lengths


def needs_token_counts(data: DataConfig) -> bool:
    """Whether plans use the lengths of samples, where these are known."""
    return data.packing or data.group_by_length


def has_token_counts(manifest: EntryManifest) -> bool:
    """Whether the scan counted the entry's tokens: only such entries are packed or grouped. O(records)."""
    if manifest.statistics is not None or not manifest.num_tokens.any():
        return False
    return _num_uncounted(manifest) <= manifest.num_bad


def check_token_counts(entries: Mapping[str, Mapping[int, EntryManifest]], data: DataConfig) -> None:
    """entries: split -> entry -> manifest. Raises ConfigError where packing or grouping would change nothing, ManifestError for
    counts that contradict each other.
    """
    if not needs_token_counts(data):
        return
    key = "data.packing" if data.packing else "data.group_by_length"
    others = []
    held = [(split, entry, manifest) for split, of_split in entries.items() for entry, manifest in of_split.items()]
    for split, entry, manifest in held:
        if has_token_counts(manifest):
            _check_segments(manifest, data)
            continue
        if manifest.statistics is not None:
            reason = "it holds actions"
        else:
            name = data.all_sources()[data.entry_sources(split)[entry]].dataset_type
            reason = (
                f"{_num_uncounted(manifest)} of its {manifest.num_records} records have no count of tokens: the dataset class "
                f"({name}) must set is_text and read turns, text or input_ids, which loader-prepare counts, or its scan must "
                "give num_tokens"
            )
            logger.warning("%s does not apply to %s: %s", key, manifest.path, reason)
        others.append(f"{manifest.path}: {reason}")
    if len(others) == sum(len(data.paths(split)) for split in ("train", "val")):
        raise ConfigError(f"{key} is for text, and here is none ({others[0]}); set {key} to false")


def _num_uncounted(manifest: EntryManifest) -> int:
    return int(np.count_nonzero((manifest.num_samples > 0) & (manifest.num_tokens == 0)))


def _check_segments(manifest: EntryManifest, data: DataConfig) -> None:
    if manifest.row_tokens is not None:
        return
    samples, tokens = (np.asarray(column).astype(np.int64) for column in (manifest.num_samples, manifest.num_tokens))
    whole = (samples - 1) * data.max_seq_len
    wrong = np.flatnonzero((samples > 1) & (tokens > 0) & ((tokens <= whole) | (tokens > whole + data.max_seq_len)))
    if len(wrong):
        record = int(wrong[0])
        raise ManifestError(
            f"{tokens[record]} tokens in {samples[record]} samples: all but the last must have data.max_seq_len = "
            f"{data.max_seq_len}; run loader-prepare again, or mend the dataset's scan",
            file=manifest.path,
            record=str(record),
            field="num_tokens",
        )
