"""The threads of a worker: tickets in, frames of pieces out.

Threads share one lock over the bookkeeping (which record is decoded, waited for, kept); decoding, encoding and packing run
outside it, in libraries that release the interpreter lock.
"""

from __future__ import annotations

import heapq
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from loader_service.build import EncodedRecord, EncodedSample, RecordEncoder, assemble_piece
from loader_service.lane_plan import LanePlan, Rows
from loader_service.prepare.manifest import EntryManifest
from loader_service.windows import LaneKey, ReadAhead, RecordCache, RecordKey, SeenRecords
from stoker_proto import codec
from stoker_proto.errors import DataError, FetchError
from stoker_proto.messages import Failure, Ticket

logger = logging.getLogger(__name__)

Deliver = Callable[[bytes, bytes], None]
"""(reply address, frame): called from the builder's threads."""


@dataclass(slots=True)
class Counters:
    """What a worker has done since its start; PROTOCOL.md lists them under Pong."""

    samples: int = 0
    records_decoded: int = 0
    records_distinct: int = 0
    skipped: int = 0
    records_ahead: int = 0
    """Of the decoded ones: kept, and no ticket had a sample of them yet."""

    def as_list(self) -> list[int]:
        """In the order of the fields."""
        return [self.samples, self.records_decoded, self.records_distinct, self.skipped, self.records_ahead]


@dataclass(slots=True, eq=False)
class _Pending:
    address: bytes
    ticket: Ticket
    entry: int
    rows: Rows
    missing: set[RecordKey]
    records: dict[int, EncodedRecord] = field(default_factory=dict)

    def size_bytes(self) -> int:
        """Of its piece, about; all records are there."""
        of = self.records
        return sum(of[ref.record].size_bytes // max(len(of[ref.record].samples), 1) for ref in self.rows.samples)


class PieceBuilder:
    """Builds pieces with a few threads, and reads ahead when no ticket waits."""

    def __init__(
        self,
        encoder: RecordEncoder,
        loader: str,
        deliver: Deliver,
        *,
        threads: int,
        cache_bytes: int,
        read_ahead: bool,
    ) -> None:
        self.counters = Counters()
        self._encoder, self._loader, self._deliver, self._read_ahead = encoder, loader, deliver, read_ahead
        self._filler = EncodedSample(
            np.array([encoder.processor.end_id], np.int32), np.zeros(1, np.uint8), (), None, timestep=0
        )
        self._wake = threading.Condition()
        self._cache = RecordCache(cache_bytes)
        self._ahead = ReadAhead()
        self._manifests: dict[tuple[str, int], EntryManifest] = {}
        self._urgent: list[tuple[int, RecordKey]] = []
        self._waiting: dict[RecordKey, list[_Pending]] = {}
        self._running: set[RecordKey] = set()
        self._seen = SeenRecords()
        self._tickets = 0
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"build-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        address: bytes,
        ticket: Ticket,
        manifest: EntryManifest,
        plan: LanePlan,
        lane: int,
        next_plan: Callable[[], LanePlan | None],
    ) -> None:
        """Build the ticket's piece; the frame goes to `deliver(address, frame)`.

        lane: its number inside the entry; next_plan: gives the plan of the epoch after this one, if there will be one.
        """
        with self._wake:
            self._tickets += 1
            self._manifests[manifest.split, manifest.entry] = manifest
            rows = plan.rows(lane, ticket.start, ticket.count)
            keys = {self._key(ticket.split, ticket.epoch, manifest.entry, ref.record) for ref in rows.samples}
            pending = _Pending(address, ticket, manifest.entry, rows, set(keys))
            for key in keys:
                value = self._cache.get(key)
                if value is not None:
                    pending.records[key.record] = value
                    pending.missing.discard(key)
                else:
                    self._waiting.setdefault(key, []).append(pending)
                    if key not in self._running:
                        heapq.heappush(self._urgent, (self._tickets, key))
            if self._read_ahead:
                lane_key = LaneKey(ticket.split, ticket.epoch, manifest.entry, lane)
                is_over = self._ahead.asked(lane_key, plan, plan.lane_length(lane), ticket.start + ticket.count)
                if is_over and (following := next_plan()) is not None and following.lane_length(lane):
                    lane_key = lane_key._replace(epoch=ticket.epoch + 1)
                    self._ahead.asked(lane_key, following, following.lane_length(lane), 0)
            self._wake.notify_all()
        if not pending.missing:
            self._finish(pending)

    def close(self) -> None:
        """Stop the threads; what is in work is finished first."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _key(self, split: str, epoch: int, entry: int, record: int) -> RecordKey:
        augmented = self._encoder.data.augment.enabled and split == "train"
        return RecordKey(split, epoch if augmented else 0, entry, record)

    def _run(self) -> None:
        while (task := self._next()) is not None:
            key, epoch = task
            outcome: EncodedRecord | DataError | FetchError
            try:
                outcome = self._encoder.encode(self._manifests[key.split, key.entry], key.record, key.epoch)
            except (DataError, FetchError) as error:
                outcome = error
            for pending in self._store(key, epoch, outcome):
                if not isinstance(outcome, EncodedRecord):
                    # What cannot be fetched now may be had later, or by another loader; bad data is the same everywhere.
                    reason = "data" if isinstance(outcome, DataError) else "unavailable"
                    if reason == "unavailable":
                        logger.warning("%s", outcome)
                    failure = Failure(ticket=pending.ticket.ticket, reason=reason, message=str(outcome))
                    self._deliver(pending.address, codec.encode(failure))
                else:
                    self._finish(pending)

    def _next(self) -> tuple[RecordKey, int] | None:
        """The next record to decode and the epoch it is for, waiting for one; None at the end."""
        with self._wake:
            while not self._closed:
                while self._urgent:
                    _, key = heapq.heappop(self._urgent)
                    if key in self._waiting and key not in self._running:
                        self._running.add(key)
                        return key, self._waiting[key][0].ticket.epoch
                if self._read_ahead and self._cache.has_room() and (ahead := self._ahead.pop()) is not None:
                    key = self._key(*ahead)
                    if key not in self._cache and key not in self._running:
                        self._running.add(key)
                        return key, ahead.epoch
                    continue
                self._wake.wait()
            return None

    def _store(self, key: RecordKey, epoch: int, outcome: EncodedRecord | DataError | FetchError) -> list[_Pending]:
        """Book a decoded record; the tickets that have all they need now (or, on an error, all that wait for it)."""
        with self._wake:
            self._running.discard(key)
            self._count(key, epoch)
            waiting = self._waiting.pop(key, [])
            if not isinstance(outcome, EncodedRecord):
                return waiting
            self._cache.put(key, outcome)
            self.counters.records_ahead = self._cache.num_ahead
            ready = []
            for pending in waiting:
                pending.records[key.record] = outcome
                pending.missing.discard(key)
                if not pending.missing:
                    ready.append(pending)
            return ready

    def _count(self, key: RecordKey, epoch: int) -> None:
        num_records = self._manifests[key.split, key.entry].num_records
        self.counters.records_decoded += 1
        self.counters.records_distinct += self._seen.is_first(key._replace(epoch=epoch), num_records)

    def _finish(self, pending: _Pending) -> None:
        size = pending.size_bytes()
        if size > codec.MAX_FRAME_BYTES:
            message = (
                f"a piece of about {size} bytes: at most {codec.MAX_FRAME_BYTES} travel; ask for fewer than "
                f"{pending.ticket.count} rows at once"
            )
            failure = Failure(ticket=pending.ticket.ticket, reason="rejected", message=message)
            self._deliver(pending.address, codec.encode(failure))
            return
        piece = assemble_piece(pending.ticket, self._loader, pending.entry, pending.rows, pending.records, self._filler)
        frame = codec.encode(piece)
        with self._wake:
            self.counters.samples += len(pending.rows.samples)
            self.counters.skipped += len(piece.skipped)
            for record, count in Counter(ref.record for ref in pending.rows.samples).items():
                key = self._key(pending.ticket.split, pending.ticket.epoch, pending.entry, record)
                self._cache.serve(key, count)
            self.counters.records_ahead = self._cache.num_ahead
            self._wake.notify_all()
        self._deliver(pending.address, frame)  # counted before: whoever has it and asks for counters finds it there
