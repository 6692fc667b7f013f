"""The counters of a PONG, under their names in PROTOCOL.md."""

from __future__ import annotations

import time

from loader_service.server.clients import Clients
from loader_service.server.outbox import Outbox
from loader_service.server.pool import Pool


def progress(
    pool: Pool, clients: Clients, outbox: Outbox, *, rejected: int, refused: int, started: float
) -> dict[str, float]:
    """Counters since the loader's start. started: its time on the monotonic clock."""
    counters = pool.counters()
    return {
        "cpu_s": pool.cpu_s(),
        "samples": counters.samples,
        "records_decoded": counters.records_decoded,
        "records_distinct": counters.records_distinct,
        "records_ahead": counters.records_ahead,
        "skipped": counters.skipped,
        "bytes_sent": outbox.bytes_sent,
        "queued": clients.num_in_work,
        "dropped": outbox.dropped,
        "rejected": rejected,
        "refused": refused,
        "uptime_s": time.monotonic() - started,
    }
