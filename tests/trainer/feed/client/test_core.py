"""The client's state machine, driven by lists of events: order, exactly once, re-issue, bounds."""

from __future__ import annotations

import ast
import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.wire.messages import Drain, Epoch, Hello, Ticket
from tests.trainer.feed.client.core_driver import EXPECTED, CoreDriver, asked
from tests.trainer.feed.fake_loader import LANES, REPOSITORY, make_piece
from trainer.feed.client.homes import Homes


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
    todo, seen = ["trainer.feed.client.core"], set()
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
    assert {"trainer.feed.client.tickets", "trainer.feed.client.fleet", "stoker_proto.order.lanes"} <= seen


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
    driver.advance(driver.options.feed.ticket_deadline_s + 0.01)
    second = driver.forget_tickets()
    assert {ticket.ticket: loader for loader, ticket in second} == {
        ticket.ticket: 1 - loader for loader, ticket in first
    }
    driver.tickets = [pair for pairs in zip(first, second, strict=True) for pair in pairs]
    driver.finish()
    assert driver.keys() == EXPECTED
    assert driver.core.tickets.counters.duplicates == len(first)


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
    assert driver.core.tickets.counters.duplicates == 1
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


def test_each_entry_is_asked_of_who_holds_it() -> None:
    driver = CoreDriver()
    driver.held = {0: [0], 1: [1]}
    driver.connect()
    driver.finish()
    tickets = [(loader, message.lane) for loader, message in driver.sent if isinstance(message, Ticket)]
    assert {(loader, lane // LANES) for loader, lane in tickets} == {(0, 0), (1, 1)}
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


@pytest.mark.long
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
        assert len(driver.delivered) - taken + len(driver.core.tickets.batches) <= driver.options.window
        if len(driver.delivered) == 16:
            break
    assert driver.error is None, f"seed {seed}"
    assert driver.keys() == EXPECTED, f"seed {seed}"


def test_an_answer_that_was_not_asked_of_that_loader_is_dropped() -> None:
    driver = CoreDriver().connect()
    loader, ticket = driver.tickets[0]
    driver.receive(1 - loader, make_piece(ticket, driver.names[1 - loader]))
    assert driver.core.tickets.counters.duplicates == 1
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
