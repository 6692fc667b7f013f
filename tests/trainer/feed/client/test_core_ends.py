"""The client's state machine: what ends a run and when: deadlines, poison, bad data; and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stoker_proto.errors import DataError, DeadlineError, LocalProtocolError
from stoker_proto.wire.messages import Ticket
from tests.trainer.feed.client.core_driver import EXPECTED, CoreDriver


def until_it_ends(driver: CoreDriver, answer: Callable[[], None]) -> float:
    """Seconds until the run has ended, time passing in steps of a quarter."""
    began = driver.now
    while driver.error is None and driver.now < began + 1000:
        answer()
        if driver.error is None:
            driver.advance(0.25)
    return driver.now - began


@pytest.mark.long
@pytest.mark.parametrize("num_loaders", [1, 4, 12])
def test_loaders_that_cannot_answer_end_the_run_at_the_data_deadline_and_not_before(num_loaders: int) -> None:
    """An object store that is gone for a minute: they all say so at once, and again whenever they are asked."""
    driver = CoreDriver(num_loaders).connect()

    def answer() -> None:
        while driver.tickets and driver.error is None:
            driver.fail(0, "unavailable")

    assert until_it_ends(driver, answer) == pytest.approx(driver.options.feed.data_deadline_s, abs=1)
    assert isinstance(driver.error, DeadlineError)
    assert "tickets unanswered, the first of lane 1, samples 0 to 2 of train epoch 0 (tcp://loader" in str(driver.error)
    assert "unavailable: because" in str(driver.error)
    assert sum(isinstance(message, Ticket) for _, message in driver.sent) < 300 * num_loaders


def test_loaders_that_are_all_slow_end_the_run_at_the_data_deadline_and_not_before() -> None:
    driver = CoreDriver(12).connect()
    assert until_it_ends(driver, lambda: None) == pytest.approx(driver.options.feed.data_deadline_s, abs=1)
    assert "did not answer in time" in str(driver.error)


def test_a_loader_that_cannot_is_not_hammered_while_another_hangs() -> None:
    driver = CoreDriver(2).connect()
    driver.silent = {0}

    def answer() -> None:
        for _ in range(50):
            position = next((n for n, (loader, _) in enumerate(driver.tickets) if loader == 1), None)
            if position is None or driver.error is not None:
                return
            driver.fail(position, "unavailable")
        pytest.fail("it is asked again as quickly as it answers")

    until_it_ends(driver, answer)
    num_asked = sum(loader == 1 and isinstance(message, Ticket) for loader, message in driver.sent)
    assert num_asked < 400


def break_connection(driver: CoreDriver, *, restarted: bool) -> None:
    """The connection to the one loader breaks, and it is back, as another incarnation or not."""
    driver.forget_tickets()
    driver.core.lost(0, "the connection broke", driver.now)
    if restarted:
        driver.names[0] += "'"
    driver.connect(start=False)


def test_a_ticket_that_loader_after_loader_dies_of_ends_the_run() -> None:
    driver = CoreDriver(1).connect()
    for _ in range(9):
        break_connection(driver, restarted=True)
    assert driver.error is None
    break_connection(driver, restarted=True)
    assert isinstance(driver.error, DeadlineError)
    assert "10 loaders or workers ended, one after the other, while they worked on lane 1, samples 0 to 2 of" in str(
        driver.error
    )
    assert "(tcp://loader0:5555: the connection broke; " in str(driver.error)


def test_a_ticket_that_worker_after_worker_dies_of_ends_the_run() -> None:
    driver = CoreDriver(1).connect()
    for count in range(10):
        assert driver.error is None, count
        driver.fail(next(n for n, (_, ticket) in enumerate(driver.tickets) if ticket.ticket == 0), "died")
        driver.advance(10.0)
    assert isinstance(driver.error, DeadlineError)
    assert "10 loaders or workers ended, one after the other, while they worked on lane 1, samples 0" in str(
        driver.error
    )
    assert "tcp://loader0:5555 died: because" in str(driver.error)


def test_connections_that_break_are_no_deaths() -> None:
    driver = CoreDriver(1).connect()
    for _ in range(40):
        break_connection(driver, restarted=False)
    driver.finish()
    assert driver.error is None
    assert driver.keys() == EXPECTED


def test_a_loader_that_restarts_again_and_again_counts_only_for_what_it_had_in_work() -> None:
    """Once it had; then the other one has everything, until its connection breaks and all of it is asked for anew."""
    driver = CoreDriver(2).connect()
    driver.forget_tickets()
    for _ in range(20):
        driver.core.lost(1, "the connection broke", driver.now)
        driver.names[1] += "'"
        driver.connect(1, start=False)
    driver.core.lost(0, "the connection broke", driver.now)
    driver.connect(0, start=False)
    assert driver.error is None
    assert len(driver.tickets) > driver.options.window


def test_bad_data_ends_the_run_at_its_place() -> None:
    driver = CoreDriver().connect()
    last = max(range(len(driver.tickets)), key=lambda i: driver.tickets[i][1].ticket)
    driver.fail(last, "data")
    assert driver.error is None
    while driver.tickets:
        driver.answer()
    assert isinstance(driver.error, DataError)
    assert str(driver.error) == "because"
    assert len(driver.delivered) == driver.options.window - 1


def test_rejected_ticket_ends_the_run() -> None:
    driver = CoreDriver().connect()
    driver.fail(0, "rejected")
    assert isinstance(driver.error, LocalProtocolError)


def test_entry_that_nobody_holds_is_named_after_the_connect_deadline() -> None:
    driver = CoreDriver()
    driver.held = {0: [0], 1: [0]}
    driver.connect()
    driver.advance(driver.options.feed.connect_deadline_s - 1)
    assert driver.error is None
    driver.advance(1)
    assert isinstance(driver.error, DeadlineError)
    assert "entry 1, data.train_data_paths[1] (second.jsonl)" in str(driver.error)


def test_nobody_there_says_who_was_looked_for() -> None:
    driver = CoreDriver(1)
    driver.core.lost(0, "nothing listens there", driver.now)
    driver.advance(driver.options.feed.connect_deadline_s)
    assert isinstance(driver.error, DeadlineError)
    assert "tcp://loader0:5555 not connected (nothing listens there), never heard of" in str(driver.error)


def test_no_data_for_too_long_is_an_error_unless_a_loader_returns() -> None:
    driver = CoreDriver(1).connect()
    driver.forget_tickets()
    driver.core.lost(0, "the connection broke", driver.now)
    driver.advance(driver.options.feed.data_deadline_s - 1)
    driver.connect(start=False)
    driver.finish()
    assert driver.error is None
    assert driver.keys() == EXPECTED

    driver.core.start(2, 0, 0, 1, driver.now)
    driver.advance()
    driver.forget_tickets()
    driver.core.lost(0, "the connection broke", driver.now)
    driver.advance()
    driver.advance(driver.options.feed.data_deadline_s)
    assert isinstance(driver.error, DeadlineError)
    assert "no data for 120 s" in str(driver.error)
    assert "last heard of 120.0 s ago" in str(driver.error)


def test_after_a_failure_nothing_is_due_any_more() -> None:
    """The deadline that failed stayed due, and the thread that drives the core turned without a pause until it was closed."""
    driver = CoreDriver(1).connect()
    driver.forget_tickets()
    driver.advance(driver.options.feed.data_deadline_s)
    assert isinstance(driver.error, DeadlineError)
    assert driver.core.next_time(driver.now) == float("inf")


def test_lanes_that_never_come_are_no_silent_hang() -> None:
    driver = CoreDriver(1).connect(start=False)
    driver.silent = {0}
    driver.core.open(0, driver.now)
    driver.advance()
    driver.advance(driver.options.feed.data_deadline_s)
    assert isinstance(driver.error, DeadlineError)


def test_consumer_that_does_not_take_is_no_error() -> None:
    driver = CoreDriver().connect()
    while driver.tickets:
        driver.answer()
    driver.advance(10 * driver.options.feed.data_deadline_s)
    assert driver.error is None
    driver.take(driver.options.window)
    driver.finish()
    assert driver.keys() == EXPECTED


def test_waiting_for_loaders_at_the_start_has_its_own_deadline() -> None:
    driver = CoreDriver(data_deadline_s=5.0)
    driver.core.start(1, 0, 0, 1, driver.now)
    driver.advance()
    driver.advance(30)
    assert driver.error is None
    assert len(driver.warnings) == 1
    assert "still waiting" in driver.warnings[0]
    driver.connect(start=False)
    driver.finish()
    assert driver.keys() == EXPECTED
