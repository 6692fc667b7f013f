"""What the first rank sees of the loaders and of its own waiting: metrics for Prometheus and loader-top, and a line of the log
that says what limits the training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from stoker_proto.errors import LocalProtocolError
from stoker_proto.fleet.metrics import CONTENT_TYPE, Samples, exposition, import_client
from stoker_proto.fleet.pages import Page, Pages
from stoker_proto.fleet.verdict import Counters, Judge, LoaderWork, TrainerWork, Verdict, work_between
from stoker_proto.host.stages import STAGES
from trainer.feed.feed import Feed

log = logging.getLogger(__name__)

_LOOK_S = 30.0
"""Between two verdicts: a window long enough for steady figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the steps of this start."""

    steps: int = 0
    samples: int = 0
    step_s: float = 0.0
    wait_s: float = 0.0
    queue_depth: int = 0
    """Not a sum: at the last step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """What is known at one moment; two make a window."""

    at: float
    totals: Totals
    loaders: Mapping[str, Counters]
    """By address."""


class FleetReport:
    """Hears of every step. Scrapes come on threads of their own."""

    def __init__(self, feed: Feed, *, metrics: str | None, flag: str = "trainer.logger.metrics") -> None:
        """metrics: HOST:PORT to serve them at, or None. Raises ConfigError that names the flag."""
        self._feed = feed
        self._totals = Totals()
        self._lock = threading.Lock()
        self._judge, self._said = Judge(), frozenset[tuple[str, str]]()
        self._first: _Moment | None = None  # where the first step ended
        self._last: _Moment | None = None  # where the last verdict was given
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
        if self._last is None:
            self._first = self._last = self._moment()
        elif time.monotonic() >= self._last.at + _LOOK_S:
            self._last = self._say_changes(self._last)

    def say_summary(self) -> None:
        """Log what limited the steps of this start after the first."""
        if self._first is None or self._totals.steps <= self._first.totals.steps:
            return
        trainer, verdicts = self._between(Judge(), self._first, self._moment())
        text = "; ".join(verdict.text for verdict in verdicts) or "the loaders sent no figures"
        log.info("data: the trainer waited %.1f%% of %.0f s; %s", 100 * trainer.wait, trainer.step_s, text)

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

    def _moment(self) -> _Moment:
        loaders = {loader.address: counters_of(loader.progress) for loader in self._feed.loaders() if loader.progress}
        with self._lock:
            return _Moment(at=time.monotonic(), totals=self._totals, loaders=loaders)

    def _say_changes(self, before: _Moment) -> _Moment:
        """Log the verdicts of the window since then, if they are others than the last ones. Returns this moment."""
        now = self._moment()
        _, verdicts = self._between(self._judge, before, now)
        kinds = frozenset((verdict.kind, verdict.loader) for verdict in verdicts)
        if verdicts and kinds != self._said:
            log.info("data: %s", "; ".join(verdict.text for verdict in verdicts))
        self._said = kinds
        return now

    @staticmethod
    def _between(judge: Judge, before: _Moment, now: _Moment) -> tuple[TrainerWork, list[Verdict]]:
        trainer = TrainerWork(
            samples=now.totals.samples - before.totals.samples,
            step_s=now.totals.step_s - before.totals.step_s,
            wait_s=now.totals.wait_s - before.totals.wait_s,
        )
        loaders: list[LoaderWork] = []
        for address, counters in now.loaders.items():
            if address in before.loaders:
                work = work_between(f"loader {address}", before.loaders[address], counters)
                loaders += [] if work is None else [work]
        return trainer, judge.look(loaders, trainer, datetime.now())

    def _answer(self) -> Page:
        try:
            return Page(200, exposition(self.metrics()), CONTENT_TYPE)
        except LocalProtocolError as error:
            return Page(503, f"{error}\n")


def counters_of(progress: Mapping[str, float]) -> Counters:
    """What the verdict needs of the counters of a PONG (PROTOCOL.md); older loaders send no stages."""
    return Counters(
        uptime_s=progress.get("uptime_s", 0.0),
        samples=progress.get("samples", 0.0),
        records=progress.get("records_decoded", 0.0),
        threads=progress.get("threads", 1.0),
        stage_s={stage: progress.get(f"{stage}_s", 0.0) for stage in STAGES},
    )
