"""The trainer's own line about what limits it, from the counters that loaders send in a PONG."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from stoker_proto.fleet.metrics import METRICS
from trainer.feed.client.tickets import TicketCounters
from trainer.feed.feed import SeenLoader
from trainer.report import fleet
from trainer.report.fleet import FleetReport


class ScriptedFeed:
    """One loader; each call of `loaders` finds it ten seconds later."""

    world_size = 2

    def __init__(self, decode_s: float) -> None:
        """decode_s: busy seconds of its two threads in ten seconds."""
        self._decode_s, self._looks = decode_s, 0

    def loaders(self) -> list[SeenLoader]:
        self._looks += 1
        counters = {"uptime_s": 10, "samples": 100, "records_decoded": 10, "decode_s": self._decode_s}
        progress = {name: value * self._looks for name, value in counters.items()} | {"threads": 2.0}
        return [
            SeenLoader(
                address="tcp://a:1", is_ready=True, share=0.5, latency_s=None, samples=7, num_open=3, progress=progress
            )
        ]

    def counters(self) -> TicketCounters:
        return TicketCounters(tickets=9, hedges=1)


def report_of(feed: Any, *, wait_s: float) -> FleetReport:
    """After four steps of 50 samples in 2.5 s."""
    report = FleetReport(feed, metrics=None)
    for _ in range(4):
        report.step(num_rows=50, step_s=2.5, wait_s=wait_s, queue_depth=1)
    return report


def test_the_line_is_logged_once_and_summed_up_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fleet, "_LOOK_S", 0.0)
    report_of(ScriptedFeed(decode_s=5), wait_s=0.01).say_summary()
    # Two threads are busy for 5 of 20 seconds.
    assert [record.getMessage() for record in caplog.records] == [
        "data: trainer-bound: loaders could give 4.0x",
        "data: the trainer waited 0.4% of 8 s; trainer-bound: loaders could give 4.0x",
    ]


def test_a_waiting_trainer_names_the_stage(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fleet, "_LOOK_S", 0.0)
    report_of(ScriptedFeed(decode_s=20), wait_s=1.25)
    # 10 samples a second at full load, 50 in 1.25 s wanted.
    assert [record.getMessage() for record in caplog.records] == ["data: decode-bound: add 3 loaders"]


def test_nothing_is_said_before_there_are_two_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report = FleetReport(ScriptedFeed(decode_s=5), metrics=None)  # type: ignore[arg-type]
    report.say_summary()
    report.step(num_rows=50, step_s=2.5, wait_s=0, queue_depth=1)
    report.say_summary()
    assert caplog.records == []


def test_the_metrics_are_those_of_the_table() -> None:
    found = report_of(ScriptedFeed(decode_s=5), wait_s=0.5).metrics()
    assert set(found) == {name for name in METRICS if name.startswith("stoker_trainer_")}
    assert found["stoker_trainer_samples_total"] == {(): 200}
    assert found["stoker_trainer_data_wait_seconds_total"] == {(): 2.0}
    assert found["stoker_trainer_loader_share"] == {("tcp://a:1",): 0.5}
    assert found["stoker_trainer_loader_latency_seconds"] == {}, "too few answers"
    assert found["stoker_trainer_hedges_total"] == {(): 1}
