"""What the fault simulator (`tests/faults`) found in the core, each as a literal list of events."""

from __future__ import annotations

from stoker_proto.errors import DeadlineError
from stoker_proto.wire.messages import Epoch, Ticket
from tests.trainer.feed.client.core_driver import EXPECTED, CoreDriver


def test_lanes_of_an_epoch_with_open_tickets_are_asked_of_a_loader_that_returns() -> None:
    """All of the last epoch was asked for, so the one before it was forgotten, and its tickets could be asked of nobody."""
    driver = CoreDriver(1, window=64).connect(start=False)
    driver.core.start(1, 0, 40, 2, driver.now)
    driver.advance()
    before = driver.forget_tickets()
    assert {ticket.epoch for _, ticket in before} == {0, 1}
    driver.core.lost(0, "killed", driver.now)
    driver.connect(start=False)
    assert [ticket for _, ticket in driver.tickets] == [ticket for _, ticket in before]
    driver.finish()
    assert driver.keys() == EXPECTED[40:] + EXPECTED


def test_a_lost_ticket_is_asked_for_again_within_four_deadlines_however_often_it_was() -> None:
    """The deadline doubled without end: the asks were at 0, 10, 30, 70 and 150 s, and the data deadline at 120 s came first."""
    driver = CoreDriver(1, data_deadline_s=1e6).connect()
    began, asks = driver.now, [0.0]
    for _ in range(160):
        driver.forget_tickets()
        driver.advance(1.0)
        asks += [driver.now - began for _, ticket in driver.tickets if ticket.ticket == 0]
    assert asks == [0.0, 10.0, 30.0, 70.0, 110.0, 150.0]


def test_lanes_of_an_epoch_that_is_opened_anew_are_asked_for_until_they_come() -> None:
    """The loader counted as having answered, from before the epoch was forgotten: one lost LANES, and the rank hung."""
    driver = CoreDriver(1).connect(start=False)
    driver.core.start(1, 0, 0, 3, driver.now)
    driver.advance()
    taken = 0
    while driver.delivered[-1:] == [] or driver.delivered[-1].slice.epoch < 2:
        driver.answer()
        driver.take(len(driver.delivered) - taken)
        taken = len(driver.delivered)
    driver.silent = {0}  # the first LANES are lost
    driver.forget_tickets()
    driver.core.start(2, 0, 56, 1, driver.now)
    driver.advance()
    driver.silent.clear()
    driver.sent.clear()
    driver.delivered.clear()
    driver.advance(driver.options.hello_retry_s)
    assert Epoch(split="train", epoch=0, entries=[0, 1]) in [message for _, message in driver.sent]
    driver.finish()
    assert driver.keys() == EXPECTED[56:]


def test_loaders_that_held_everything_one_after_the_other_have_met_the_connect_deadline() -> None:
    """It counted only entries held at the same time, and ended a run that was being given data."""
    driver = CoreDriver()
    driver.held = {0: [0], 1: [1]}
    driver.connect(0)
    driver.core.lost(0, "killed", driver.now)
    driver.connect(1, start=False)
    assert [message.lane // 4 for _, message in driver.sent if isinstance(message, Ticket)][:1] == [1]
    driver.advance(driver.options.feed.connect_deadline_s)
    assert driver.error is None
    driver.advance(driver.options.feed.data_deadline_s - driver.options.feed.connect_deadline_s)
    assert isinstance(driver.error, DeadlineError)
    assert "no data for 120 s" in str(driver.error)
    assert "entry 0, data.train_data_paths[0] (first.jsonl)" in str(driver.error)


def test_a_ticket_that_all_refused_is_asked_of_a_loader_that_comes_back_at_once() -> None:
    """It was paused for 8 s after a few rounds of refusals, and the pause outlived the reason: a loader had come back."""
    driver = CoreDriver(2, window=1).connect()
    for _ in range(12):
        while driver.tickets:
            driver.fail(0, "unavailable")
        driver.advance(0.7)
    driver.core.lost(1, "killed", driver.now)
    driver.names[1] = "next"
    while driver.tickets:
        driver.fail(0, "unavailable")
    assert not driver.tickets
    driver.connect(1, start=False)
    assert driver.tickets


def test_the_pause_between_rounds_is_no_longer_than_a_ticket_may_take() -> None:
    """It grew to 8 s whatever the deadlines were, and with short ones the data deadline came first."""
    driver = CoreDriver(1, window=1, ticket_deadline_s=1.0).connect()
    for _ in range(20):
        while driver.tickets:
            driver.fail(0, "unavailable")
        driver.advance(1.0)
        assert driver.tickets
