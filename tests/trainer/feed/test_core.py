"""The client's state machine, driven by lists of events: order, exactly once, re-issue, refusal, deadlines, bounds."""

from __future__ import annotations

import ast
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.errors import DataError, DeadlineError, LocalProtocolError, RefusedError
from stoker_proto.messages import Drain, Epoch, Hello, Lanes, Refuse, Ticket
from stoker_proto.order import Order
from tests.trainer.feed.core_driver import CoreDriver, asked
from tests.trainer.feed.fake_loader import CELL, LANES, LENGTHS, REPOSITORY, make_piece
from trainer.feed.homes import Homes
from trainer.feed.peer import State

EXPECTED = [
    (run.lane // LANES, run.lane, run.start + i)
    for run in Order(LENGTHS[0] + LENGTHS[1], CELL).runs(0, 60)
    for i in range(run.count)
]


def test_core_imports_nothing_impure() -> None:
    forbidden = {
        "asyncio",
        "concurrent",
        "os",
        "queue",
        "random",
        "secrets",
        "select",
        "socket",
        "threading",
        "time",
        "zmq",
    }
    todo, seen = ["trainer.feed.core"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        root = REPOSITORY / "proto" if name.startswith("stoker_proto") else REPOSITORY
        path = Path(root, *name.split("."))
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                children = [f"{module}.{alias.name}" for alias in node.names]
                names = children if module in ("trainer.feed", "stoker_proto") else [module]
            assert not {name.partition(".")[0] for name in names} & forbidden, f"{name} imports {names}"
            todo += [
                n for n in names if n.startswith(("trainer.feed.", "stoker_proto.")) and not n.endswith("_VERSION")
            ]
    assert {"trainer.feed.desk", "trainer.feed.fleet", "stoker_proto.order"} <= seen


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_answers_gives_the_same_stream(seed: int) -> None:
    rng = random.Random(seed)
    driver = CoreDriver().connect()
    driver.finish(rng.randrange)
    assert driver.error is None
    assert driver.keys() == EXPECTED
    assert [d.slice.num_rows for d in driver.delivered] == [4] * 15 + [0]


def test_number_of_loaders_does_not_matter() -> None:
    one, three = CoreDriver(1).connect(), CoreDriver(3).connect()
    one.finish()
    three.finish()
    assert one.keys() == three.keys() == EXPECTED


def test_window_bounds_what_is_asked_until_the_consumer_takes() -> None:
    driver = CoreDriver(window=3).connect()
    while driver.tickets:
        driver.answer(-1)
    assert len(driver.delivered) == 3
    driver.take()
    assert sum(ticket.count for _, ticket in driver.tickets) == 4


def test_ticket_limit_bounds_what_is_asked() -> None:
    driver = CoreDriver(window=16, max_tickets=4).connect()
    assert len(driver.tickets) <= 4
    driver.finish()
    assert driver.keys() == EXPECTED


def test_a_micro_batch_of_more_tickets_than_the_limit_still_comes() -> None:
    driver = CoreDriver(max_tickets=1).connect()
    driver.finish()
    assert driver.keys() == EXPECTED


def test_lost_loader_is_replaced_at_once() -> None:
    driver = CoreDriver().connect()
    assert asked(driver.tickets) == {0, 1}
    before = driver.forget_tickets()
    driver.core.lost(1, "gone", driver.now)
    driver.advance()
    assert [ticket for _, ticket in driver.tickets] == [ticket for loader, ticket in before if loader == 1]
    assert asked(driver.tickets) == {0}
    driver.tickets += [(loader, ticket) for loader, ticket in before if loader == 0]
    driver.finish()
    assert driver.keys() == EXPECTED


def test_late_ticket_goes_to_another_loader_and_either_answer_counts_once() -> None:
    driver = CoreDriver(silence_s=1e9).connect()
    first = driver.forget_tickets()
    driver.advance(driver.options.ticket_deadline_s + 0.01)
    second = driver.forget_tickets()
    assert {ticket.ticket: loader for loader, ticket in second} == {
        ticket.ticket: 1 - loader for loader, ticket in first
    }
    driver.tickets = [pair for pairs in zip(first, second, strict=True) for pair in pairs]
    driver.finish()
    assert driver.keys() == EXPECTED
    assert driver.core.desk.counters.duplicates == len(first)


def test_silent_loader_is_passed_over_before_the_ticket_deadline() -> None:
    driver = CoreDriver(ticket_deadline_s=1e6).connect()
    driver.silent = {1}
    driver.forget_tickets()
    for _ in range(6):
        driver.advance(driver.options.ping_interval_s)
    assert driver.tickets
    assert asked(driver.tickets) == {0}


def test_a_lone_silent_loader_is_not_hammered() -> None:
    driver = CoreDriver(1).connect()
    driver.silent = {0}
    count = len(driver.forget_tickets())
    for _ in range(30):
        driver.advance(1.0)
    assert driver.error is None
    assert count <= len(driver.tickets) <= 2 * count


def test_answers_of_an_earlier_session_are_dropped() -> None:
    driver = CoreDriver().connect()
    stale = driver.forget_tickets()
    driver.core.start(2, 0, 8, 1, driver.now)
    driver.advance()
    for loader, ticket in stale:
        driver.receive(loader, make_piece(ticket, driver.names[loader]))
    driver.advance()
    assert not driver.delivered
    driver.finish()
    assert {delivery.session for delivery in driver.delivered} == {2}
    assert driver.keys() == EXPECTED[8:]


def test_answer_of_a_dead_incarnation_is_dropped() -> None:
    driver = CoreDriver(1).connect()
    loader, ticket = driver.tickets[0]
    driver.receive(loader, make_piece(ticket, "an earlier name"))
    assert driver.core.desk.counters.duplicates == 1
    driver.finish()
    assert driver.keys() == EXPECTED


def test_restarted_loader_is_asked_again_at_once() -> None:
    driver = CoreDriver(1).connect()
    before = driver.forget_tickets()
    driver.core.lost(0, "killed", driver.now)
    driver.advance(3.0)
    assert not driver.tickets
    driver.names[0] = "next"
    driver.connect(start=False)
    assert [ticket for _, ticket in driver.tickets] == [ticket for _, ticket in before]


def test_unavailable_asks_another_then_pauses() -> None:
    driver = CoreDriver().connect()
    loader, ticket = driver.tickets[0]
    driver.fail(0, "unavailable")
    assert driver.tickets[-1] == (1 - loader, ticket)
    driver.fail(len(driver.tickets) - 1, "unavailable")
    assert ticket not in [open_ticket for _, open_ticket in driver.tickets]
    driver.advance(1.0)
    assert ticket in [open_ticket for _, open_ticket in driver.tickets]


def until_it_ends(driver: CoreDriver, answer: Callable[[], None]) -> float:
    """Seconds until the run has ended, time passing in steps of a quarter."""
    began = driver.now
    while driver.error is None and driver.now < began + 1000:
        answer()
        if driver.error is None:
            driver.advance(0.25)
    return driver.now - began


@pytest.mark.parametrize("num_loaders", [1, 4, 12])
def test_loaders_that_cannot_answer_end_the_run_at_the_data_deadline_and_not_before(num_loaders: int) -> None:
    """An object store that is gone for a minute: they all say so at once, and again whenever they are asked."""
    driver = CoreDriver(num_loaders).connect()

    def answer() -> None:
        while driver.tickets and driver.error is None:
            driver.fail(0, "unavailable")

    assert until_it_ends(driver, answer) == pytest.approx(driver.options.data_deadline_s, abs=1)
    assert isinstance(driver.error, DeadlineError)
    assert "tickets unanswered, the first of lane 1, samples 0 to 2 of train epoch 0 (tcp://loader" in str(driver.error)
    assert "unavailable: because" in str(driver.error)
    assert sum(isinstance(message, Ticket) for _, message in driver.sent) < 300 * num_loaders


def test_loaders_that_are_all_slow_end_the_run_at_the_data_deadline_and_not_before() -> None:
    driver = CoreDriver(12).connect()
    assert until_it_ends(driver, lambda: None) == pytest.approx(driver.options.data_deadline_s, abs=1)
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


def test_piece_of_the_wrong_size_excludes_the_loader() -> None:
    driver = CoreDriver().connect()
    loader, _ = driver.tickets[0]
    driver.answer(0, lambda ticket, name: make_piece(dataclasses.replace(ticket, count=ticket.count + 1), name))
    assert "broke the protocol" in driver.warnings[0]
    driver.tickets = [pair for pair in driver.tickets if pair[0] != loader]
    driver.finish()
    assert driver.keys() == EXPECTED


def test_draining_loader_answers_what_it_has_and_gets_no_more() -> None:
    driver = CoreDriver().connect()
    driver.receive(1, Drain(loader="name1"))
    before = len(driver.sent)
    driver.finish()
    assert not [1 for loader, message in driver.sent[before:] if loader == 1 and isinstance(message, Ticket)]
    assert driver.keys() == EXPECTED


def test_refusal_names_what_differs() -> None:
    driver = CoreDriver(1)
    driver.silent = {0}
    driver.connect(start=False)
    driver.receive(0, Refuse(protocol=PROTOCOL_VERSION, differences=[["codec", "c9", "c1"]]))
    driver.advance()
    assert isinstance(driver.error, RefusedError)
    assert "codec: the loader has c9, this rank c1" in str(driver.error)
    assert "tcp://loader0:5555" in str(driver.error)


def test_second_loader_that_differs_from_the_first_is_refused() -> None:
    driver = CoreDriver()
    driver.fingerprints[1]["tokenizer"] = "other"
    driver.connect(start=False)
    assert isinstance(driver.error, RefusedError)
    assert "tokenizer: the loader has other, this rank t1" in str(driver.error)


def test_pins_of_a_checkpoint_are_sent_and_held_against_the_loader() -> None:
    driver = CoreDriver(1, fingerprints={"plan": "of the checkpoint"})
    driver.connect(start=False)
    hello = next(message for _, message in driver.sent if isinstance(message, Hello))
    assert hello.fingerprints == {"plan": "of the checkpoint"}
    assert isinstance(driver.error, RefusedError)
    assert "plan: the loader has p1, this rank of the checkpoint" in str(driver.error)


def test_other_protocol_version_is_refused() -> None:
    driver = CoreDriver(1)
    driver.silent = {0}
    driver.connect(start=False)
    driver.receive(0, dataclasses.replace(driver.welcome(0), protocol=PROTOCOL_VERSION + 1))
    driver.advance()
    assert f"protocol: the loader has {PROTOCOL_VERSION + 1}, this rank {PROTOCOL_VERSION}" in str(driver.error)


def test_a_loader_that_comes_later_and_differs_is_left_out() -> None:
    driver = CoreDriver()
    driver.fingerprints[1]["codec"] = "other"
    driver.connect(0)
    driver.core.connected(1, driver.now)
    driver.advance()
    driver.finish()
    assert driver.error is None
    assert "codec: the loader has other, this rank c1" in driver.warnings[0]
    assert asked([pair for pair in driver.sent if isinstance(pair[1], Ticket)]) == {0}  # type: ignore[misc]
    assert driver.keys() == EXPECTED


def wait_for_the_first_validation() -> CoreDriver:
    """The core of a split that is read later: connected at the start, no micro-batch wanted yet, an hour of training gone."""
    driver = CoreDriver().connect(0, start=False)
    driver.core.open(0, driver.now)
    driver.advance()
    driver.core.begin()
    for _ in range(60):
        driver.advance(60.0)
    assert driver.error is None
    return driver


def test_a_loader_that_differs_and_joins_before_the_first_validation_is_left_out() -> None:
    driver = wait_for_the_first_validation()
    driver.fingerprints[1]["codec"] = "other"
    driver.connect(1)
    driver.finish()
    assert driver.error is None
    assert "codec: the loader has other, this rank c1" in driver.warnings[0]
    assert asked([pair for pair in driver.sent if isinstance(pair[1], Ticket)]) == {0}  # type: ignore[misc]
    assert driver.keys() == EXPECTED


def test_keys_that_stop_fitting_before_the_first_validation_leave_the_loader_out() -> None:
    driver = wait_for_the_first_validation()
    driver.core.denied(1, "the loader at B refused our key", driver.now)
    driver.advance()
    assert (driver.error, driver.warnings) == (None, ["the loader at B refused our key"])


def test_a_loader_that_differs_ends_the_start_also_once_the_stream_is_known() -> None:
    """Minutes may pass between the first answer and the first step, and the one that answered first may be the wrong one."""
    driver = CoreDriver().connect(0, start=False)
    driver.core.open(0, driver.now)
    driver.advance(30.0)
    driver.fingerprints[1]["codec"] = "other"
    driver.connect(1, start=False)
    assert isinstance(driver.error, RefusedError)


def test_a_run_that_has_begun_is_still_ended_by_a_difference_from_the_first_loader_of_all() -> None:
    driver = CoreDriver(1, fingerprints={"plan": "of the checkpoint"})
    driver.core.begin()
    driver.connect()
    assert isinstance(driver.error, RefusedError)


def test_keys_that_do_not_fit_end_the_run_at_its_start() -> None:
    driver = CoreDriver(1)
    driver.core.denied(0, "the loader at A refused our key", driver.now)
    driver.advance()
    assert isinstance(driver.error, RefusedError)
    assert str(driver.error) == "the loader at A refused our key"


def test_keys_that_stop_fitting_leave_the_loader_out_until_they_fit_again() -> None:
    driver = CoreDriver(2).connect(0, 1)
    driver.core.lost(1, "the connection broke", driver.now)
    driver.core.denied(1, "the loader at B refused our key", driver.now)
    driver.advance()
    assert driver.error is None
    assert driver.warnings == ["the loader at B refused our key"]
    assert driver.core.fleet.loaders[1].state is State.REFUSED
    driver.connect(1, start=False)
    assert driver.core.fleet.loaders[1].state is State.READY


def test_lanes_that_differ_are_refused() -> None:
    driver = CoreDriver().connect(start=False)
    driver.core.open(0, driver.now)
    driver.advance()
    driver.receive(1, Lanes(split="train", epoch=0, lengths={0: [9, 14, 0, 8]}, starts={0: [0] * 4}, tokens={}))
    driver.advance()
    assert "samples of entry 0, epoch 0: the loader has 31, this rank 30" in str(driver.error)


def test_each_entry_is_asked_of_who_holds_it() -> None:
    driver = CoreDriver()
    driver.held = {0: [0], 1: [1]}
    driver.connect()
    driver.finish()
    tickets = [(loader, message.lane) for loader, message in driver.sent if isinstance(message, Ticket)]
    assert {(loader, lane // LANES) for loader, lane in tickets} == {(0, 0), (1, 1)}
    assert driver.keys() == EXPECTED


def test_entry_that_nobody_holds_is_named_after_the_connect_deadline() -> None:
    driver = CoreDriver()
    driver.held = {0: [0], 1: [0]}
    driver.connect()
    driver.advance(driver.options.connect_deadline_s - 1)
    assert driver.error is None
    driver.advance(1)
    assert isinstance(driver.error, DeadlineError)
    assert "entry 1, data.train_data_paths[1] (second.jsonl)" in str(driver.error)


def test_nobody_there_says_who_was_looked_for() -> None:
    driver = CoreDriver(1)
    driver.core.lost(0, "nothing listens there", driver.now)
    driver.advance(driver.options.connect_deadline_s)
    assert isinstance(driver.error, DeadlineError)
    assert "tcp://loader0:5555 not connected (nothing listens there), never heard of" in str(driver.error)


def test_no_data_for_too_long_is_an_error_unless_a_loader_returns() -> None:
    driver = CoreDriver(1).connect()
    driver.forget_tickets()
    driver.core.lost(0, "the connection broke", driver.now)
    driver.advance(driver.options.data_deadline_s - 1)
    driver.connect(start=False)
    driver.finish()
    assert driver.error is None
    assert driver.keys() == EXPECTED

    driver.core.start(2, 0, 0, 1, driver.now)
    driver.advance()
    driver.forget_tickets()
    driver.core.lost(0, "the connection broke", driver.now)
    driver.advance()
    driver.advance(driver.options.data_deadline_s)
    assert isinstance(driver.error, DeadlineError)
    assert "no data for 120 s" in str(driver.error)
    assert "last heard of 120.0 s ago" in str(driver.error)


def test_after_a_failure_nothing_is_due_any_more() -> None:
    """The deadline that failed stayed due, and the thread that drives the core turned without a pause until it was closed."""
    driver = CoreDriver(1).connect()
    driver.forget_tickets()
    driver.advance(driver.options.data_deadline_s)
    assert isinstance(driver.error, DeadlineError)
    assert driver.core.next_time(driver.now) == float("inf")


def test_lanes_that_never_come_are_no_silent_hang() -> None:
    driver = CoreDriver(1).connect(start=False)
    driver.silent = {0}
    driver.core.open(0, driver.now)
    driver.advance()
    driver.advance(driver.options.data_deadline_s)
    assert isinstance(driver.error, DeadlineError)


def test_consumer_that_does_not_take_is_no_error() -> None:
    driver = CoreDriver().connect()
    while driver.tickets:
        driver.answer()
    driver.advance(10 * driver.options.data_deadline_s)
    assert driver.error is None
    driver.take(driver.options.window)
    driver.finish()
    assert driver.keys() == EXPECTED


def test_next_epoch_is_fetched_ahead() -> None:
    driver = CoreDriver().connect(start=False)
    driver.core.start(1, 0, 40, 2, driver.now)
    driver.advance()
    driver.finish()
    assert driver.keys() == EXPECTED[40:] + EXPECTED
    assert [d.slice.epoch for d in driver.delivered] == [0] * 6 + [1] * 16


def test_joining_loader_takes_its_share() -> None:
    driver = CoreDriver().connect(0)
    driver.core.connected(1, driver.now)
    driver.advance()
    driver.finish()
    assert asked([pair for pair in driver.sent if isinstance(pair[1], Ticket)]) == {0, 1}  # type: ignore[misc]
    assert driver.keys() == EXPECTED


@pytest.mark.parametrize("seed", range(40))
def test_faults_in_any_order_alter_nothing(seed: int) -> None:
    """A small simulator: answers in any order, twice, never; loaders lost, back under another name; time passes."""
    rng = random.Random(seed)
    driver = CoreDriver(3).connect()
    taken, up = 0, {0, 1, 2}
    for step in range(4000):
        choice = rng.random()
        if choice < 0.75 and driver.tickets:
            loader, ticket = driver.tickets[rng.randrange(len(driver.tickets))]
            if rng.random() < 0.9:
                driver.tickets.remove((loader, ticket))
            if rng.random() < 0.9 and loader in up:
                driver.receive(loader, make_piece(ticket, driver.names[loader]))
        elif choice < 0.80 and len(up) > 1:
            loader = rng.choice(sorted(up))
            up.remove(loader)
            driver.core.lost(loader, "killed", driver.now)
            driver.tickets = [pair for pair in driver.tickets if pair[0] != loader]
        elif choice < 0.9 and len(up) < 3:
            loader = rng.choice(sorted({0, 1, 2} - up))
            up.add(loader)
            driver.names[loader] = f"name{loader}.{step}"
            driver.core.connected(loader, driver.now)
        driver.advance(rng.choice([0.0, 0.1, 1.0]))
        if len(driver.delivered) > taken and rng.random() < 0.5:
            driver.take()
            taken += 1
        assert len(driver.delivered) - taken + len(driver.core.desk.jobs) <= driver.options.window
        if len(driver.delivered) == 16:
            break
    assert driver.error is None, f"seed {seed}"
    assert driver.keys() == EXPECTED, f"seed {seed}"


def test_an_answer_that_was_not_asked_of_that_loader_is_dropped() -> None:
    driver = CoreDriver().connect()
    loader, ticket = driver.tickets[0]
    driver.receive(1 - loader, make_piece(ticket, driver.names[1 - loader]))
    assert driver.core.desk.counters.duplicates == 1
    driver.finish()
    assert driver.keys() == EXPECTED


def test_hello_and_epoch_are_sent_again_until_they_are_answered() -> None:
    driver = CoreDriver(1)
    driver.silent = {0}
    driver.connect()
    driver.advance(driver.options.hello_retry_s)
    assert [type(message) for _, message in driver.sent] == [Hello, Hello]
    driver.receive(0, driver.welcome(0))
    driver.advance()
    driver.advance(driver.options.hello_retry_s)
    asked = [message for _, message in driver.sent if isinstance(message, Epoch)]
    assert asked == [Epoch(split="train", epoch=0, entries=[0, 1])] * 2


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


def test_another_number_of_lanes_or_entries_is_refused() -> None:
    driver = CoreDriver(1).connect(start=False)
    driver.core.open(5, driver.now)
    driver.receive(0, Lanes(split="train", epoch=5, lengths={0: [1, 2]}, starts={0: [0, 0]}, tokens={}))
    driver.advance()
    assert "lanes of entry 0: the loader has 2, this rank 4" in str(driver.error)

    driver = CoreDriver(1, entries=("only.jsonl",), sources=(0,))
    driver.connect(start=False)
    assert "entries of the train data: the loader has 2, this rank 1" in str(driver.error)


def test_next_epoch_is_announced_before_it_is_needed() -> None:
    driver = CoreDriver(1).connect(start=False)
    driver.core.start(1, 0, 0, 2, driver.now)
    driver.advance()
    taken = 0
    while Epoch(split="train", epoch=1, entries=[0, 1]) not in [message for _, message in driver.sent]:
        driver.answer()
        driver.take(len(driver.delivered) - taken)
        taken = len(driver.delivered)
    assert taken <= 8  # of 16


def test_homes_are_even_and_stable() -> None:
    homes = Homes(("tcp://a:1", "tcp://b:1", "tcp://c:1"), 32)
    three = homes(0, {0: 0, 1: 0, 2: 0})
    assert np.bincount([lane[0] for lane in three]).max() == 11
    assert all(sorted(lane) == [0, 1, 2] for lane in three)
    two = homes(0, {0: 0, 1: 0})
    assert np.bincount([lane[0] for lane in two]).tolist() == [16, 16]
    kept = [one[0] for one, other in zip(three, two, strict=True) if one[0] != 2 and one[0] == other[0]]
    assert len(kept) >= 15  # of the 21 lanes whose home is still there most stay
    assert homes(1, {0: 0, 1: 0}) != two


def test_homes_are_the_same_for_all_ranks() -> None:
    driver, other = CoreDriver(3).connect(), CoreDriver(3, rank=1, world_size=2).connect()
    choices = [[one.core.fleet.choices(lane, 0, one.now) for lane in range(2 * LANES)] for one in (driver, other)]
    assert choices[0] == choices[1]
    assert {lane[0] for lane in choices[0]} == {0, 1, 2}
