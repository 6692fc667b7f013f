"""Rows of a step -> pieces, made by the code that answers tickets, and their digests.

Each run of a lane becomes one piece, as for the rank that asked for it. A record that several runs need is decoded once while it
fits into the memory for it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from loader_service.inspection.rows import InspectedRow, InspectedSample
from loader_service.manifest import EntryManifest
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.piece import EncodedRecord, assemble_piece, filler_of
from loader_service.plan.lane_plan import Rows, SampleRef
from loader_service.replay.step import SPLIT, RunStep, Stream
from stoker_proto.order.lanes import LaneRun
from stoker_proto.wire.digests import digests_of_rows
from stoker_proto.wire.messages import Ticket

_MOST_BYTES = 256 << 20
"""Of decoded records that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuiltRow:
    """One row of the step as the data makes it now."""

    row: InspectedRow
    rank: int
    micro_batch: int
    number: int
    """In the micro-batch."""
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuiltBatch:
    """One micro-batch of one rank."""

    rank: int
    index: int
    rows: tuple[RebuiltRow, ...]

    @property
    def digest(self) -> str:
        """Hex, as in the log."""
        return hashlib.sha256(b"".join(row.digest for row in self.rows)).hexdigest()


class Rebuilder:
    """Makes the rows of a run's steps again."""

    def __init__(self, manifests: dict[int, EntryManifest], encoder: RecordEncoder, stream: Stream) -> None:
        """manifests: of all train entries."""
        self._manifests, self._encoder, self._stream = manifests, encoder, stream
        self._filler = filler_of(encoder.processor)
        self._records: OrderedDict[tuple[int, int, int], EncodedRecord] = OrderedDict()  # by entry, record, pass
        self._size_bytes = 0

    def step(self, step: RunStep, rank: int | None) -> Iterator[RebuiltBatch]:
        """The micro-batches of one rank or of all, in the order of the stream. Raises DataError for a bad record."""
        for index in range(len(step.lines[0].micro_batches)):
            for number in range(len(step.lines)):
                if rank in (None, number):
                    yield self.batch(step, number, index)

    def batch(self, step: RunStep, rank: int, index: int) -> RebuiltBatch:
        """One micro-batch of one rank. Raises DataError for a bad record."""
        runs = self._stream.micro_batch(step.lines[rank], rank, index)
        rows = [row for run in runs for row in self._run(run, step.record.digest_rule)]
        return RebuiltBatch(
            rank=rank,
            index=index,
            rows=tuple(
                RebuiltRow(row=row, rank=rank, micro_batch=index, number=place, digest=digest)
                for place, (row, digest) in enumerate(rows)
            ),
        )

    def _run(self, run: LaneRun, rule: int) -> Iterator[tuple[InspectedRow, bytes]]:
        """The rows of a run, each with its digest."""
        entry, lane = self._stream.lane_of(run)
        manifest, plan = self._manifests[entry], self._stream.plan(run.epoch, entry)
        rows = plan.rows(lane, run.start, run.count)
        records = {record: self._record(manifest, record, run.epoch) for record, _ in rows.samples}
        ticket = Ticket(ticket=0, split=SPLIT, epoch=run.epoch, lane=run.lane, start=run.start, count=run.count)
        piece = assemble_piece(ticket, "stoker-batch", entry, rows, records, self._filler)
        for number, (refs, digest) in enumerate(zip(_by_row(rows), digests_of_rows(piece, rule), strict=True)):
            samples = tuple(_inspected(manifest, ref, records[ref.record]) for ref in refs)
            place = f"pass {run.epoch}, lane {lane}, row {run.start + number} of {plan.lane_length(lane)}"
            yield InspectedRow(manifest, place, samples), digest

    def _record(self, manifest: EntryManifest, record: int, epoch: int) -> EncodedRecord:
        key = manifest.entry, record, epoch
        if key not in self._records:
            self._records[key] = self._encoder.encode(manifest, record, epoch)
            self._size_bytes += self._records[key].size_bytes
            while self._size_bytes > _MOST_BYTES and len(self._records) > 1:
                _, dropped = self._records.popitem(last=False)
                self._size_bytes -= dropped.size_bytes
        return self._records[key]


def _by_row(rows: Rows) -> Iterator[list[SampleRef]]:
    """The samples of each row."""
    start = 0
    for count in rows.row_samples or [1] * len(rows.samples):
        yield [SampleRef(*pair) for pair in rows.samples[start : start + count]]
        start += count


def _inspected(manifest: EntryManifest, ref: SampleRef, record: EncodedRecord) -> InspectedSample:
    encoded = None if record.error is not None else record.samples[ref.sample]
    return InspectedSample(ref, *manifest.place(ref.record), encoded, record.error)
