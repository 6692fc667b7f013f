"""What waits for plans is bounded, and what is asked twice waits once."""

from __future__ import annotations

import pytest

from loader_service.server import waiting as awaiting_module
from loader_service.server.waiting import MAX_PER_CLIENT, WaitingRequests
from stoker_proto.wire.messages import Epoch, Ticket


def lanes(epoch: int, *entries: int) -> Epoch:
    return Epoch(split="train", epoch=epoch, entries=list(entries))


def ticket(number: int) -> Ticket:
    return Ticket(ticket=number, split="train", epoch=0, lane=0, start=0, count=1)


def test_what_waits_is_taken_once_in_its_order() -> None:
    waiting = WaitingRequests()
    assert waiting.add_lanes(b"a", lanes(1, 0))
    assert waiting.add_lanes(b"b", lanes(1, 0, 3))
    assert waiting.add_ticket(b"a", ticket(7), b"frame 7")
    assert waiting.add_ticket(b"a", ticket(6), b"frame 6")
    assert waiting.take() == (
        [(b"a", lanes(1, 0)), (b"b", lanes(1, 0, 3))],
        [(b"a", ticket(7), b"frame 7"), (b"a", ticket(6), b"frame 6")],
    )
    assert waiting.take() == ([], [])


def test_who_asks_again_and_again_waits_once() -> None:
    waiting = WaitingRequests()
    for number in range(3 * MAX_PER_CLIENT):
        assert waiting.add_lanes(b"a", lanes(1, number % 3))
        assert waiting.add_ticket(b"a", ticket(7), b"frame")
    asked, tickets = waiting.take()
    assert asked == [(b"a", lanes(1, 0, 1, 2))]
    assert len(tickets) == 1


def test_one_connection_takes_no_more_than_its_share() -> None:
    waiting = WaitingRequests()
    for _ in range(2):
        assert [waiting.add_lanes(b"a", lanes(n, 0)) for n in range(2000)].count(True) == MAX_PER_CLIENT
        assert [waiting.add_ticket(b"a", ticket(n), b"") for n in range(2000)].count(True) == MAX_PER_CLIENT
        assert waiting.add_lanes(b"b", lanes(0, 0))
        assert waiting.add_ticket(b"b", ticket(0), b"")
        assert waiting.add_lanes(b"a", lanes(0, 0))  # it waits already
        assert waiting.add_ticket(b"a", ticket(0), b"")
        waiting.take()


def test_all_of_them_together_take_no_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awaiting_module, "_MAX_ENTRIES", 10)
    monkeypatch.setattr(awaiting_module, "_MAX_TICKETS", 10)
    waiting = WaitingRequests()
    for _ in range(2):
        assert [waiting.add_lanes(b"%d" % n, lanes(0, 0, 1, 2)) for n in range(5)].count(True) == 3
        assert [waiting.add_ticket(b"%d" % n, ticket(0), b"") for n in range(50)].count(True) == 10
        waiting.take()
