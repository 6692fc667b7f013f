"""Each rank's list of batch digests, by which runs are compared and past steps are made again."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

from stoker_proto.run_record import ROW_BYTES, log_file
from trainer.feed.batch import StepBatch

log = logging.getLogger(__name__)


class DigestLog:
    """`{output_dir}/digests-rank{r}.jsonl`: one line per step, to compare runs. Never truncated: a resumed run appends.

    `stoker_proto.run_record` describes the lines, which `stoker-batch` reads.
    """

    def __init__(self, folder: Path, rank: int, record: str) -> None:
        """record: name of this run's `RunRecord`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._record, self._path = record, log_file(folder, rank)
        path = self._path
        self._is_cut = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
        """Whether the last line is unfinished: by a run that was killed while it wrote, or by a full disk."""
        self._file = path.open("ab", buffering=0)
        self._num_lost = 0

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
        self._write(json.dumps(line).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        """A disk that is full must not end a run: what it has trained since its last checkpoint would be lost."""
        data = b"\n" + line if self._is_cut else line
        try:
            written = self._file.write(data) or 0
            reason = "the disk is full"
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        if written == len(data):
            self._is_cut = False
            return
        self._is_cut = self._is_cut or written > 0
        self._num_lost += 1
        if self._num_lost == 1:
            log.warning(
                "%s cannot be written (%s): batches of such steps cannot be made again from it", self._path, reason
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._num_lost:
            log.warning("%s lacks %d steps, for which there was no room", self._path, self._num_lost)
            self._num_lost = 0


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()
