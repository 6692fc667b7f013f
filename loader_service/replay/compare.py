"""Compares rebuilt rows with the run's log: which rows differ, and what else has changed."""

from __future__ import annotations

from collections.abc import Mapping

from loader_service.inspection.rows import InspectedSample
from loader_service.replay.rebuild import RebuiltBatch, RebuiltRow
from loader_service.replay.step import SPLIT, RunStep
from stoker_proto.config import DataConfig
from stoker_proto.errors import DataError

_MOST_NAMED = 5
"""Rows that an error names."""
_OF_NO_ROW = ("manifest/val/", "files/val/", "mixture")


class Comparison:
    """Collects the micro-batches of a step; then `check`."""

    def __init__(self, step: RunStep) -> None:
        self._step = step
        self._differing: list[RebuiltRow] = []
        self._batches: list[RebuiltBatch] = []  # that differ
        self.num_rows = 0
        """Rows that were compared."""

    def add(self, batch: RebuiltBatch) -> list[RebuiltRow]:
        """Compare a micro-batch. Returns its rows that differ from the log."""
        line = self._step.lines[batch.rank]
        self.num_rows += len(batch.rows)
        if batch.digest == line.micro_batches[batch.index]:
            return []
        self._batches.append(batch)
        found = [row for row in batch.rows if not _is_logged(row, line.row_digest(batch.index, row.number))]
        self._differing += found
        return found

    def check(self, changes: list[str]) -> None:
        """Raises DataError that names the rows that differ. changes: what else differs from the run (`changes_since`)."""
        if not self._batches:
            return
        named = [_name(row) for row in self._differing[:_MOST_NAMED]]
        if not named:  # another number of rows
            named = [f"rank {batch.rank}, micro-batch {batch.index}: {len(batch.rows)} rows" for batch in self._batches]
        more = len(self._differing) - len(named)
        raise DataError(
            f"step {self._step.lines[0].step}: {len(self._differing)} of {self.num_rows} rows are not those that were trained: "
            + "; ".join(named)
            + (f"; and {more} more" if more > 0 else "")
            + (f". Since the run, these changed: {', '.join(changes)}" if changes else "")
            + ". Give the command the data, the model folder and the libraries of the run"
        )


def changes_since(trained: Mapping[str, str], now: Mapping[str, str], data: DataConfig) -> list[str]:
    """What a fingerprint shows to differ from the run, in words; not everything in it changes the rows of a step."""
    names = sorted(name for name in trained.keys() & now.keys() if trained[name] != now[name])
    return [_words(name, data) for name in names if not name.startswith(_OF_NO_ROW)]


def _words(name: str, data: DataConfig) -> str:
    kind, _, place = name.partition("/")
    split, _, entry = place.partition("/")
    if split == SPLIT and entry.isdecimal() and int(entry) < len(data.paths(SPLIT)):
        what = "files named by" if kind == "files" else "content of"
        return f"{what} {data.path_key(SPLIT, int(entry))} ({data.paths(SPLIT)[int(entry)]})"
    return name


def _is_logged(row: RebuiltRow, logged: str) -> bool:
    return logged != "" and row.digest.hex().startswith(logged)


def _name(row: RebuiltRow) -> str:
    samples = ", ".join(_origin(sample) for sample in row.row.samples[:_MOST_NAMED])
    return f"rank {row.rank}, micro-batch {row.micro_batch}, row {row.number}: {samples}"


def _origin(sample: InspectedSample) -> str:
    return f"record {sample.ref.record}, sample {sample.ref.sample} of {sample.shard} (offset {sample.offset})"
