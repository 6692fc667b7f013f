"""A dataset of questions and answers whose tokens are counted beforehand, as `loader-prepare` counts those of real text.

    {"samples": [["what is this?", "a cube"]], "tokens": 9}

A record of several samples stands for a long text: all of them but the last are `max_seq_len` tokens long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson

from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord
from stoker_proto.errors import DataError
from stoker_proto.processor import Processor


class Questions(BaseSFTDataset):
    """Record: one line. `"picture": true` gives the sample an image, `"broken": true` makes `read` fail."""

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        """One record a line."""
        offset = 0
        for line in shard.read_bytes().splitlines(keepends=True):
            record = orjson.loads(line)
            yield ScannedRecord(
                offset=offset, size=len(line), num_samples=len(record["samples"]), num_tokens=record["tokens"]
            )
            offset += len(line)

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        """Its samples."""
        record = orjson.loads(shard.read_bytes()[offset : offset + size])
        if record.get("broken"):
            raise DataError("no turns", file=str(shard), record=str(offset))
        images = (np.zeros((64, 64, 3), np.uint8),) if record.get("picture") else ()
        for number, (question, answer) in enumerate(record["samples"]):
            yield Sample(instruction=question, answer=answer, timestep=number, images=images)


def write_questions(file: Path, processor: Processor, lengths: Sequence[int], max_seq_len: int) -> None:
    """Texts of so many tokens (8 at least); of more than `max_seq_len`: several samples, all but the last of that many."""

    def count(answer: str) -> int:
        return len(processor.encode("ask", 0, answer=answer).input_ids)

    shortest = count("")
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if count(f" {letter} {letter}") == shortest + 2]
    with file.open("wb") as lines:
        for number, length in enumerate(lengths):
            full, rest = divmod(length - 1, max_seq_len)
            sizes = [max_seq_len] * full + [max(rest + 1, shortest)]
            letter = letters[number % len(letters)]
            samples = [["ask", f" {letter}" * (size - shortest)] for size in sizes]
            tokens = sum(count(answer) for _, answer in samples)
            assert tokens == sum(sizes)
            lines.write(orjson.dumps({"samples": samples, "tokens": tokens}) + b"\n")
