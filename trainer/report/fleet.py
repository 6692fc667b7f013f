"""What the first rank sees of the loaders and of its own waiting: metrics for Prometheus and loader-top."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from stoker_proto.errors import LocalProtocolError
from stoker_proto.fleet.metrics import CONTENT_TYPE, Samples, exposition, import_client
from stoker_proto.fleet.pages import Page, Pages
from trainer.feed.feed import Feed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the steps of this start."""

    steps: int = 0
    samples: int = 0
    step_s: float = 0.0
    wait_s: float = 0.0
    queue_depth: int = 0
    """Not a sum: at the last step."""


class FleetReport:
    """Hears of every step. Scrapes come on threads of their own."""

    def __init__(self, feed: Feed, *, metrics: str | None, flag: str = "trainer.logger.metrics") -> None:
        """metrics: HOST:PORT to serve them at, or None. Raises ConfigError that names the flag."""
        self._feed = feed
        self._totals = Totals()
        self._lock = threading.Lock()
        self._pages = Pages({"/metrics": self._answer})
        if metrics is not None:
            import_client()
            log.info("metrics at http://%s/metrics", self._pages.start(metrics, flag))

    def step(self, *, num_rows: int, step_s: float, wait_s: float, queue_depth: int) -> None:
        """One more step. num_rows: over all ranks; step_s: with the data wait; wait_s, queue_depth: of the worst rank."""
        with self._lock:
            before = self._totals
            self._totals = Totals(
                steps=before.steps + 1,
                samples=before.samples + num_rows,
                step_s=before.step_s + step_s,
                wait_s=before.wait_s + wait_s,
                queue_depth=queue_depth,
            )

    def close(self) -> None:
        """Stop serving. Call it before the feed is closed."""
        self._pages.close()

    def metrics(self) -> Samples:
        """All metrics of this trainer. Raises LocalProtocolError when the feed is closed."""
        with self._lock:
            totals = self._totals
        tickets, loaders = self._feed.counters(), self._feed.loaders()
        single = {
            "steps_total": totals.steps,
            "samples_total": totals.samples,
            "step_seconds_total": totals.step_s,
            "data_wait_seconds_total": totals.wait_s,
            "queue_depth": totals.queue_depth,
            "tickets_total": tickets.tickets,
            "reissued_total": tickets.reissued,
            "hedges_total": tickets.hedges,
            "hedges_won_total": tickets.hedges_won,
            "takeovers_total": tickets.takeovers,
            "duplicates_total": tickets.duplicates,
        }
        return {
            "stoker_trainer_info": {(str(self._feed.world_size),): 1.0},
            **{f"stoker_trainer_{name}": {(): float(value)} for name, value in single.items()},
            "stoker_trainer_loader_ready": {(one.address,): float(one.is_ready) for one in loaders},
            "stoker_trainer_loader_samples_total": {(one.address,): float(one.samples) for one in loaders},
            "stoker_trainer_loader_share": {(one.address,): one.share for one in loaders},
            "stoker_trainer_loader_latency_seconds": {
                (one.address,): one.latency_s for one in loaders if one.latency_s is not None
            },
            "stoker_trainer_loader_open_tickets": {(one.address,): float(one.num_open) for one in loaders},
        }

    def _answer(self) -> Page:
        try:
            return Page(200, exposition(self.metrics()), CONTENT_TYPE)
        except LocalProtocolError as error:
            return Page(503, f"{error}\n")
