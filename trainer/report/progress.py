"""Progress of a run: the live bar, the summary, and each rank's list of batch digests."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from stoker_proto.run_record import ROW_BYTES, log_file
from trainer.feed.batch import StepBatch


class ProgressBar:
    """A bar of the steps, with loss, step time and data wait; only the first rank shows it."""

    def __init__(self, *, total: int, done: int, shown: bool) -> None:
        pause_s = 0.5 if sys.stderr.isatty() else 15.0  # a log file gets a line every 15 s
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not shown,
            unit="step",
            desc="train",
            mininterval=pause_s,
            dynamic_ncols=True,
        )

    def advance(self, *, loss: float, step_s: float, wait_s: float) -> None:
        """One more step is done."""
        self._bar.set_postfix(
            {"loss": f"{loss:.4f}", "step": f"{step_s:.2f}s", "data wait": f"{wait_s:.2f}s"}, refresh=False
        )
        self._bar.update()

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._bar.close()


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
            "loss": finite(loss),
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


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write one line of JSON; infinity and NaN become null."""
    path.write_text(json.dumps(finite(summary)) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with every infinity and NaN replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value
