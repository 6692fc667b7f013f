"""The loader's figures: the counters of a PONG, under their names in PROTOCOL.md, and the metrics that Prometheus scrapes."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from loader_service.server.clients import Clients
from loader_service.server.outbox import Outbox
from loader_service.server.pool import Pool
from loader_service.server.waiting import WaitingRequests
from stoker_proto.fleet.metrics import Samples
from stoker_proto.host.stages import STAGES
from stoker_proto.wire.encoding import KINDS, decode
from stoker_proto.wire.messages import Failure, Piece

_PIECE = next(kind for kind, message in KINDS.items() if message is Piece)[0]


@dataclass(slots=True)
class Tally:
    """What the front counts itself."""

    started: float = field(default_factory=time.monotonic)
    rejected: int = 0
    """Messages that broke the protocol."""
    send_s: float = 0.0
    """Seconds in which the front handed frames to ZeroMQ."""
    answers: Counter[str] = field(default_factory=Counter)
    """Answers to tickets: piece, or the reason of a FAILURE."""

    def answered(self, frame: bytes | memoryview) -> None:
        """Count a worker's answer: a PIECE, which is not decoded, or a FAILURE."""
        is_piece = frame[0] == _PIECE
        failure = None if is_piece else decode(frame)
        self.answers[failure.reason if isinstance(failure, Failure) else "piece"] += 1


def progress(pool: Pool, clients: Clients, outbox: Outbox, tally: Tally, *, refused: int) -> dict[str, float]:
    """Counters since the loader's start. refused: handshakes."""
    counters = pool.counters()
    return {
        "cpu_s": pool.cpu_s(),
        "samples": counters.samples,
        "records_decoded": counters.records_decoded,
        "records_distinct": counters.records_distinct,
        "records_ahead": counters.records_ahead,
        "skipped": counters.skipped,
        "excluded": counters.excluded,
        "bytes_sent": outbox.bytes_sent,
        "queued": clients.num_in_work,
        "dropped": outbox.dropped,
        "rejected": tally.rejected,
        "refused": refused,
        "uptime_s": time.monotonic() - tally.started,
        "threads": pool.num_threads,
        **{f"{stage}_s": seconds for stage, seconds in zip(STAGES, counters.stage_s, strict=True)},
    }


def metrics(
    pool: Pool, clients: Clients, waiting: WaitingRequests, outbox: Outbox, tally: Tally, *, cache_limit_bytes: int
) -> Samples:
    """Metrics of `stoker_proto.fleet.metrics` that need no more than these."""
    counters = pool.counters()
    stages = dict(zip(STAGES, counters.stage_s, strict=True)) | {"queue": counters.queue_s, "send": tally.send_s}
    single = {
        "uptime_seconds": time.monotonic() - tally.started,
        "ranks": len(clients),
        "samples_total": counters.samples,
        "threads": pool.num_threads,
        "cpu_seconds_total": pool.cpu_s(),
        "resident_bytes": pool.resident_bytes(),
        "records_decoded_total": counters.records_decoded,
        "records_distinct_total": counters.records_distinct,
        "records_ahead": counters.records_ahead,
        "cache_hits_total": counters.cache_hits,
        "cache_misses_total": counters.cache_misses,
        "cache_bytes": counters.cache_bytes,
        "cache_limit_bytes": cache_limit_bytes,
        "disk_cache_hits_total": counters.disk_hits,
        "disk_cache_misses_total": counters.disk_misses,
        "disk_cache_read_bytes_total": counters.disk_read_bytes,
        "disk_cache_written_bytes_total": counters.disk_written_bytes,
        "disk_cache_damaged_total": counters.disk_damaged,
        "sent_bytes_total": outbox.bytes_sent,
        "unread_bytes": outbox.unread_bytes(),
        "dropped_frames_total": outbox.dropped,
        "bad_samples_total": counters.skipped,
        "excluded_samples_total": counters.excluded,
    }
    return {
        **{f"stoker_loader_{name}": {(): float(value)} for name, value in single.items()},
        "stoker_loader_tickets": {("waiting",): waiting.num_tickets, ("building",): clients.num_in_work},
        "stoker_loader_answers_total": {(kind,): float(number) for kind, number in _answers(tally).items()},
        "stoker_loader_stage_seconds_total": {(stage,): seconds for stage, seconds in stages.items()},
    }


def _answers(tally: Tally) -> dict[str, int]:
    """All kinds, so that a rate of one that has not come yet is 0."""
    return dict.fromkeys(("piece", "data", "died", "rejected", "unavailable"), 0) | tally.answers
