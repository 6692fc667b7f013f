"""The threads of a worker: tickets in, frames of pieces out.

Threads share one lock over the bookkeeping (which record is decoded, waited for, kept); decoding, encoding and packing run
outside it, in libraries that release the interpreter lock.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loader_service.disk_cache.store import DiskCounters
from loader_service.manifest import EntryManifest
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.piece import EncodedRecord, Outcome, assemble_piece, filler_of
from loader_service.pieces.read_ahead import LaneKey, ReadAhead
from loader_service.pieces.record_cache import RecordCache, RecordKey, SeenRecords
from loader_service.plan.lane_plan import LanePlan, Rows
from stoker_proto.errors import DataError, LocalProtocolError
from stoker_proto.host.stages import IDLE, PACK, READ, STAGES, StageClock, start_clock, switch
from stoker_proto.host.trouble import host_error
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Failure, Shards, Ticket
from stoker_proto.wire.row_bits import unpack_rows

logger = logging.getLogger(__name__)

_MOST_RECORDS = 128
_MOST_BYTES = 512 << 10
"""Limits of a batch of small records, which a thread encodes together: enough to spread the fixed cost, about 50 ms of work."""

_WARN_EVERY_S = 30.0
_MOST_WARNED = 64

Deliver = Callable[[bytes, bytes], None]
"""(reply address, frame). The builder's threads call it."""


@dataclass(slots=True)
class Counters:
    """What a worker has done since its start; PROTOCOL.md lists them under Pong."""

    samples: int = 0
    records_decoded: int = 0
    records_distinct: int = 0
    skipped: int = 0
    excluded: int = 0
    """Samples sent without labels because data.exclude names them."""
    records_ahead: int = 0
    """Decoded and kept, before any ticket asked for a sample of them."""
    cache_hits: int = 0
    """Records that a ticket found in memory; `cache_misses`: that it did not, so they were decoded for it."""
    cache_misses: int = 0
    cache_bytes: int = 0
    """Of the encoded records in memory now."""
    disk_hits: int = 0
    """Records found in the cache on disk (`loader.disk_cache_gb`); `disk_misses`: that were looked for there and encoded then."""
    disk_misses: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
    disk_damaged: int = 0
    """Records on disk whose bytes are not those that were written; they are encoded again."""
    queue_s: float = 0.0
    """Seconds from each ticket's arrival until all its records were there, added up."""
    stage_s: list[float] = field(default_factory=lambda: [0.0] * len(STAGES))
    """Seconds that the threads were busy in each of `stoker_proto.host.stages.STAGES`, over all threads."""

    def as_list(self) -> list[Any]:
        """In the order of the fields: `Counters(*as_list)` is equal."""
        return [getattr(self, name) for name in _FIELDS]

    def __add__(self, other: Counters) -> Counters:
        """Of both together."""
        sums = [a + b for a, b in zip(self.as_list()[:-1], other.as_list()[:-1], strict=True)]
        return Counters(*[*sums, [a + b for a, b in zip(self.stage_s, other.stage_s, strict=True)]])

    def without_gauges(self) -> Counters:
        """Counters of a worker that has ended: its work still counts, what it held in memory does not."""
        return dataclasses.replace(self, records_ahead=0, cache_bytes=0)


_FIELDS = tuple(one.name for one in dataclasses.fields(Counters))


@dataclass(slots=True, eq=False)
class _Pending:
    address: bytes
    ticket: Ticket
    entry: int
    rows: Rows
    counts: dict[RecordKey, int] = field(default_factory=dict)
    """Record -> how many of its samples the ticket needs."""
    missing: set[RecordKey] = field(default_factory=set)
    records: dict[int, EncodedRecord] = field(default_factory=dict)
    has_failed: bool = False
    arrived: float = field(default_factory=time.perf_counter)

    def size_bytes(self) -> int:
        """About how many bytes the piece has. Call it when all records are there."""
        size = 0
        for key, count in self.counts.items():
            record = self.records[key.record]
            size += record.size_bytes * count // max(len(record.samples), 1)
        return size


def chosen_rows(plan: LanePlan, ticket: Ticket, lane: int) -> Rows:
    """The rows that a ticket wants. lane: its number inside the entry. Raises LocalProtocolError."""
    rows = plan.rows(lane, ticket.start, ticket.count)
    if not ticket.rows:
        return rows
    if rows.row_samples is not None:
        raise LocalProtocolError("packed rows are sent all or none")
    return Rows([rows.samples[row] for row in unpack_rows(ticket.rows, ticket.count).tolist()], None)


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
        disk: DiskCounters | None = None,
    ) -> None:
        """disk: what the encoder's cache on disk counts."""
        self._counters = Counters()
        self._disk = disk or DiskCounters()
        self._clocks: list[StageClock] = []  # of the threads
        self._pack_s = 0.0  # of the thread that submits, which has no clock
        self._encoder, self._loader, self._deliver, self._read_ahead = encoder, loader, deliver, read_ahead
        self._is_augmented = encoder.data.augment.enabled
        self._filler = filler_of(encoder.processor)
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._cache = RecordCache(cache_bytes)
        self._ahead = ReadAhead()
        self._manifests: dict[tuple[str, int], EntryManifest] = {}
        self._urgent: deque[RecordKey] = deque()  # in the order of the tickets
        self._waiting: dict[RecordKey, list[_Pending]] = {}
        self._running: set[RecordKey] = set()
        self._seen = SeenRecords()
        self._warned: dict[str, float] = {}  # message -> when
        self._closed = False
        self._num_idle = 0
        """Threads that wait for work."""
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

        lane: its number inside the entry. next_plan: returns the plan of the next epoch, or None if there is none (yet).
        """
        with self._lock:
            rows = chosen_rows(plan, ticket, lane)  # plans remember windows, and threads read ahead in them
            elsewhere = None if manifest.held is None else self._elsewhere(ticket, manifest, rows)
            if elsewhere is None:
                self._manifests[manifest.split, manifest.entry] = manifest
                pending = _Pending(address, ticket, manifest.entry, rows)
                self._collect(pending)
                if self._read_ahead:
                    self._look_ahead(LaneKey(ticket.split, ticket.epoch, manifest.entry, lane), plan, ticket, next_plan)
                self._wake_threads()
        if elsewhere is not None:
            self._deliver(address, encoding.encode(elsewhere))
        elif not pending.missing:
            self._finish(pending)

    def _collect(self, pending: _Pending) -> None:
        """Give a new ticket the records that are here. Those that are not become urgent."""
        counts: dict[int, int] = {}
        for record, _ in pending.rows.samples:
            counts[record] = counts.get(record, 0) + 1
        split = pending.ticket.split
        epoch = self._epoch_of_key(split, pending.ticket.epoch)
        for record, count in counts.items():
            key = RecordKey(split, epoch, pending.entry, record)
            pending.counts[key] = count
            value = self._cache.get(key)
            if value is not None:
                self._counters.cache_hits += 1
                pending.records[record] = value
            else:
                self._counters.cache_misses += 1
                pending.missing.add(key)
                self._waiting.setdefault(key, []).append(pending)
                if key not in self._running:
                    self._urgent.append(key)

    def _look_ahead(
        self, lane: LaneKey, plan: LanePlan, ticket: Ticket, next_plan: Callable[[], LanePlan | None]
    ) -> None:
        """Note how far a lane was asked for; at its end, go on in its next epoch."""
        is_over = self._ahead.asked(lane, plan, plan.lane_length(lane.lane), ticket.start + ticket.count)
        if is_over and (following := next_plan()) is not None and following.lane_length(lane.lane):
            lane = lane._replace(epoch=ticket.epoch + 1)
            self._ahead.asked(lane, following, following.lane_length(lane.lane), 0)

    def _wake_threads(self) -> None:
        """Wake the threads that wait, if there may be something to do. Each waking costs two turns of the interpreter lock."""
        if self._num_idle and (self._urgent or (self._read_ahead and self._cache.has_room() and self._ahead.peek())):
            self._wake.notify_all()

    def counters(self) -> Counters:
        """What was done so far; a copy."""
        seconds = [sum(of_stage) for of_stage in zip(*(clock.seconds[:IDLE] for clock in self._clocks), strict=True)]
        seconds = seconds or [0.0] * len(STAGES)
        seconds[PACK] += self._pack_s
        disk = {f"disk_{name}": value for name, value in dataclasses.asdict(self._disk).items()}
        return dataclasses.replace(self._counters, cache_bytes=self._cache.size_bytes, stage_s=seconds, **disk)

    def _elsewhere(self, ticket: Ticket, manifest: EntryManifest, rows: Rows) -> Shards | Failure | None:
        """The answer to a ticket some of whose rows lie in shards that are not here; None if all are here."""
        shards: list[int] = manifest.shard_index[[record for record, _ in rows.samples]].tolist()
        absent = next((shard for shard in shards if shard not in (manifest.held or ())), None)
        if absent is None:
            return None
        if ticket.rows:  # the rank knows where these rows are, and asks the wrong loader
            message = f"the shard {manifest.shards[absent]} of {manifest.path} is not held here"
            return Failure(ticket=ticket.ticket, reason="unavailable", message=message)
        return Shards(ticket=ticket.ticket, loader=self._loader, shards=shards)

    def close(self, deadline_s: float) -> bool:
        """Stop the threads after they have finished what they work on. False if one still works at the deadline: it hangs in a
        read of a file system, and ends with the process."""
        with self._lock:
            self._closed = True
            self._wake.notify_all()
        deadline = time.monotonic() + deadline_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _epoch_of_key(self, split: str, epoch: int) -> int:
        """The epoch of a RecordKey."""
        return epoch if self._is_augmented and split == "train" else 0

    def _run(self) -> None:
        self._clocks.append(start_clock())
        while batch := self._next():
            switch(READ)
            places = [(self._manifests[key.split, key.entry], key.record) for key, _ in batch]
            outcomes = self._encode(places, batch[0][1])
            for pending, outcome in self._store(batch, outcomes):
                if not isinstance(outcome, EncodedRecord):
                    # A file that cannot be fetched now may be fetched later, or by another loader. Bad data is bad on every
                    # loader.
                    reason = "data" if isinstance(outcome, DataError) else "unavailable"
                    if reason == "unavailable":
                        self._warn(str(outcome))
                    self._fail(pending, reason, str(outcome))
                else:
                    self._finish(pending)
            switch(IDLE)

    def _encode(self, places: Sequence[tuple[EntryManifest, int]], epoch: int) -> Sequence[Outcome]:
        """The outcome of each record. Trouble of the host that stops the whole batch is the outcome of all of them."""
        try:
            return self._encoder.encode_all(places, epoch)
        except Exception as error:
            trouble = host_error(error)
            if trouble is None:
                raise
            return [trouble for _ in places]

    def _fail(self, pending: _Pending, reason: str, message: str) -> None:
        failure = Failure(ticket=pending.ticket.ticket, reason=reason, message=message)
        self._deliver(pending.address, encoding.encode(failure))

    def _warn(self, message: str) -> None:
        """Log a message, but the same one at most every 30 s: ranks ask again and again."""
        now = time.monotonic()
        with self._lock:
            if now - self._warned.get(message, -_WARN_EVERY_S) < _WARN_EVERY_S:
                return
            if len(self._warned) >= _MOST_WARNED:
                self._warned.clear()
            self._warned[message] = now
        logger.warning("%s", message)

    def _next(self) -> list[tuple[RecordKey, int]]:
        """The next records to decode, each with its epoch. Waits until there is one; returns [] at the end.

        Small records of the same epoch come together, up to the limits of a batch.
        """
        with self._lock:
            while not self._closed:
                batch: list[tuple[RecordKey, int]] = []
                size = 0
                while (found := self._take(batch)) is not None:
                    batch.append(found)
                    key = found[0]
                    self._running.add(key)
                    manifest = self._manifests[key.split, key.entry]
                    size += int(manifest.sizes[key.record])
                    if not self._encoder.is_small(manifest) or len(batch) >= _MOST_RECORDS or size >= _MOST_BYTES:
                        break
                if batch:
                    return batch
                self._num_idle += 1
                self._wake.wait()
                self._num_idle -= 1
            return []

    def _take(self, batch: list[tuple[RecordKey, int]]) -> tuple[RecordKey, int] | None:
        """A record that tickets wait for, or else one to read ahead; None if no record may join the batch."""
        while self._urgent:
            key = self._urgent[0]
            if key in self._waiting and key not in self._running:
                epoch = self._waiting[key][0].ticket.epoch
                if not self._may_join(batch, key, epoch):
                    return None
                self._urgent.popleft()
                return key, epoch
            self._urgent.popleft()
        while self._read_ahead and self._cache.has_room() and (ahead := self._ahead.peek()) is not None:
            key = RecordKey(ahead.split, self._epoch_of_key(ahead.split, ahead.epoch), ahead.entry, ahead.record)
            is_here = self._manifests[key.split, key.entry].holds(key.record)
            is_new = is_here and key not in self._cache and key not in self._running
            if is_new and not self._may_join(batch, key, ahead.epoch):
                return None
            self._ahead.pop()
            if is_new:
                return key, ahead.epoch
        return None

    def _may_join(self, batch: list[tuple[RecordKey, int]], key: RecordKey, epoch: int) -> bool:
        if not batch:
            return True
        return epoch == batch[0][1] and self._encoder.is_small(self._manifests[key.split, key.entry])

    def _store(
        self, batch: Sequence[tuple[RecordKey, int]], outcomes: Sequence[Outcome]
    ) -> list[tuple[_Pending, Outcome]]:
        """Store decoded records. Returns the tickets that are complete now, and those for which a record failed."""
        done: list[tuple[_Pending, Outcome]] = []
        with self._lock:
            for (key, epoch), outcome in zip(batch, outcomes, strict=True):
                self._running.discard(key)
                num_records = self._manifests[key.split, key.entry].num_records
                if not (isinstance(outcome, EncodedRecord) and outcome.is_stored):
                    self._counters.records_decoded += 1
                    self._counters.records_distinct += self._seen.is_first(key, epoch, num_records)
                waiting = self._waiting.pop(key, ())
                if isinstance(outcome, EncodedRecord):
                    self._cache.put(key, outcome)
                for pending in waiting:
                    if pending.has_failed:  # the first bad record was reported
                        continue
                    if isinstance(outcome, EncodedRecord):
                        pending.records[key.record] = outcome
                        pending.missing.discard(key)
                    else:
                        pending.has_failed = True
                    if pending.has_failed or not pending.missing:
                        done.append((pending, outcome))
            self._counters.records_ahead = self._cache.num_ahead
        return done

    def _finish(self, pending: _Pending) -> None:
        complete = time.perf_counter()
        switch(PACK)
        size = pending.size_bytes()
        if size > encoding.MAX_FRAME_BYTES:
            message = (
                f"a piece of about {size} bytes: at most {encoding.MAX_FRAME_BYTES} travel; ask for fewer than "
                f"{pending.ticket.count} rows at once"
            )
            self._fail(pending, "rejected", message)
            return
        try:
            piece = assemble_piece(
                pending.ticket, self._loader, pending.entry, pending.rows, pending.records, self._filler
            )
            frame = encoding.encode(piece)
        except MemoryError as error:
            trouble = str(host_error(error, "a piece"))
            self._warn(trouble)
            self._fail(pending, "unavailable", trouble)
            return
        with self._lock:
            counters = self._counters
            counters.samples += len(pending.rows.samples)
            counters.queue_s += complete - pending.arrived
            if switch(IDLE) == IDLE:
                self._pack_s += time.perf_counter() - complete
            counters.skipped += len(piece.skipped)
            has_excluded = False
            for key, count in pending.counts.items():
                self._cache.serve(key, count)
                has_excluded = has_excluded or bool(pending.records[key.record].excluded)
            if has_excluded:
                counters.excluded += sum(
                    sample in pending.records[record].excluded for record, sample in pending.rows.samples
                )
            counters.records_ahead = self._cache.num_ahead
            self._wake_threads()  # there may be room now
        self._deliver(
            pending.address, frame
        )  # after counting, so that a rank that has the piece finds it in the counters
