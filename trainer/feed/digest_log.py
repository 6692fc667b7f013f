"""Each rank's list of batch digests, by which runs are compared and past steps are made again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TextIO

from stoker_proto.run_record import ROW_BYTES, log_file
from trainer.feed.batch import StepBatch


class DigestLog:
    """`{output_dir}/digests-rank{r}.jsonl`: one line per step, to compare runs. Never truncated: a resumed run appends.

    `stoker_proto.run_record` describes the lines, which `stoker-batch` reads.
    """

    def __init__(self, folder: Path, rank: int, record: str) -> None:
        """record: name of this run's `RunRecord`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._record, path = record, log_file(folder, rank)
        is_unfinished = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
        self._file: TextIO = path.open("a", encoding="utf-8")
        if is_unfinished:  # by a run that was killed while it wrote
            self._file.write("\n")

    def add(self, step: int, batch: StepBatch, loss: float) -> None:
        """Write the line of a step. step: counted from 1; loss: of the global batch, in full precision."""
        line = {
            "step": step,
            "epoch": batch.epoch,
            "first_sample": batch.first_sample,
            "micro_batches": [micro_batch.digest.hex() for micro_batch in batch.micro_batches],
            "rows": ["".join(row[:ROW_BYTES].hex() for row in one.row_digests) for one in batch.micro_batches],
            "record": self._record,
            "loss": loss if math.isfinite(loss) else None,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()
