"""Loaders that hold parts of an entry: who is asked for what, and what becomes of a part whose loader is gone."""

from __future__ import annotations

import pytest

from stoker_proto.wire.messages import Message, Shards, Ticket
from stoker_proto.wire.row_bits import unpack_rows
from tests.trainer.feed.client.core_driver import EXPECTED, CoreDriver, asked
from tests.trainer.feed.fake_loader import make_piece
from trainer.feed.client.holdings import Missing, holds, lacked_by_both, share_a_shard

SHARDS = 4


def shard_of(lane: int, position: int) -> int:
    return (lane + 3 * position) % SHARDS


def lacking(*shards: int) -> list[list[int | str]]:
    """`Welcome.missing` of a loader that lacks these shards of both entries."""
    return [[entry, n, n + 1, SHARDS, f"s{n}", f"s{n}"] for entry in (0, 1) for n in shards]


def shards_of(ticket: Ticket) -> list[int]:
    """Of the rows that are wanted."""
    rows = unpack_rows(ticket.rows, ticket.count).tolist() if ticket.rows else range(ticket.count)
    return [shard_of(ticket.lane, ticket.start + row) for row in rows]


def answer_of(driver: CoreDriver, loader: int, ticket: Ticket) -> Message:
    lacks = {int(row[1]) for row in driver.missing.get(loader, [])}
    if not lacks.intersection(shards_of(ticket)):
        return make_piece(ticket, driver.names[loader])
    assert not ticket.rows, f"loader {loader} lacks {lacks} and was asked for {ticket}"
    return Shards(ticket=ticket.ticket, loader=driver.names[loader], shards=shards_of(ticket))


def finish(driver: CoreDriver) -> None:
    """Answer all that is asked, and take all that is delivered."""
    taken = len(driver.delivered)
    while driver.tickets:
        loader = driver.tickets[0][0]
        driver.answer(0, lambda ticket, _, loader=loader: answer_of(driver, loader, ticket))  # type: ignore[misc]
        driver.take(len(driver.delivered) - taken)
        taken = len(driver.delivered)


def fleet(*lacks: tuple[int, ...], connect: int | None = None) -> CoreDriver:
    """A loader for each, which lacks these shards; the first `connect` are there."""
    driver = CoreDriver(len(lacks))
    driver.missing = {number: lacking(*shards) for number, shards in enumerate(lacks)}
    return driver.connect(*range(len(lacks) if connect is None else connect))


@pytest.mark.parametrize("lacks", [((2, 3), (0, 1)), ((3,), (0,), (1, 2)), ((), (0, 1, 2)), ((0,), (1,), (2,), (3,))])
def test_every_sample_comes_once_and_in_order(lacks: tuple[tuple[int, ...], ...]) -> None:
    driver = fleet(*lacks)
    finish(driver)
    assert driver.error is None
    assert driver.keys() == EXPECTED
    assert driver.core.tickets.num_tickets == 0
    assert not driver.core.tickets._pending


def test_a_part_whose_loader_is_gone_is_divided_among_those_that_come() -> None:
    """Loader 0 alone holds shards 0 and 1; the two that come after it hold one of them each."""
    driver = fleet((2, 3), (0, 1), (1, 2, 3), (0, 2, 3), connect=2)
    for loader, ticket in driver.forget_tickets():
        driver.receive(loader, answer_of(driver, loader, ticket))
    driver.advance()
    assert asked(driver.tickets) == {0, 1}
    assert any(set(shards_of(ticket)) == {0, 1} for loader, ticket in driver.tickets if loader == 0)
    driver.core.lost(0, "killed", driver.now)
    driver.tickets = [(loader, ticket) for loader, ticket in driver.tickets if loader != 0]
    finish(driver)
    assert driver.keys() != EXPECTED  # what loader 0 alone had waits
    assert driver.error is None
    driver.connect(2, start=False)
    finish(driver)
    assert driver.keys() != EXPECTED
    driver.connect(3, start=False)
    finish(driver)
    assert driver.error is None
    assert driver.keys() == EXPECTED


def test_shards_that_nobody_holds_are_named_when_the_deadline_passes() -> None:
    driver = fleet((2, 3), (0, 1))
    driver.core.lost(1, "killed", driver.now)
    driver.tickets = [(loader, ticket) for loader, ticket in driver.tickets if loader != 1]
    finish(driver)
    assert driver.error is None
    for _ in range(100):
        driver.advance(driver.options.feed.data_deadline_s / 50)
        if driver.error is not None:
            break
    text = str(driver.error)
    assert "held by no ready loader: of entry 0, data.train_data_paths[0] (first.jsonl): shard s2; shard s3" in text
    assert "holds entries [0, 1] (of [0, 1] a part only)" in text


def test_an_epoch_begins_only_when_all_shards_have_been_seen() -> None:
    driver = CoreDriver(2)
    driver.missing = {0: lacking(2, 3), 1: lacking(0, 1)}
    driver.core.connected(0, driver.now)
    driver.core.open(0, driver.now)
    driver.advance()
    driver.advance(5.0)
    assert not driver.opened
    assert ["shard s2" in text for text in driver.warnings] == [True]
    driver.core.connected(1, driver.now)
    driver.advance()
    assert {one.epoch for one in driver.opened} == {0}


def test_a_loader_that_says_twice_where_rows_are_is_left_out() -> None:
    driver = fleet((2, 3), (0, 1))
    for loader, ticket in driver.forget_tickets():
        driver.receive(loader, answer_of(driver, loader, ticket))
    driver.advance()
    loader, part = next((loader, ticket) for loader, ticket in driver.tickets if ticket.rows)
    driver.receive(loader, Shards(ticket=part.ticket, loader=driver.names[loader], shards=shards_of(part)))
    driver.advance()
    assert "answered with the shards of rows that it says it holds" in driver.warnings[-1]


def test_ranges_of_shards() -> None:
    a, b = [Missing(5, 10, 10, "s5", "s9")], [Missing(0, 5, 10, "s0", "s4"), Missing(8, 9, 10, "s8", "s8")]
    assert lacked_by_both(a, b) == [Missing(8, 9, 10, "s8", "s8")]
    assert lacked_by_both(a, a) == a
    assert lacked_by_both(a, []) == []
    assert [holds(b, [shard]) for shard in (4, 5, 7, 8, 9)] == [False, True, True, False, True]
    assert share_a_shard({0: a}, {0: b}) is False
    assert share_a_shard({0: a}, {0: b[:1]}) is False
    assert share_a_shard({0: [Missing(5, 9, 10, "s5", "s8")]}, {0: b}) is True
    assert share_a_shard({0: a}, {0: []}) is True
    assert share_a_shard({0: a}, {1: []}) is False
    assert [str(one) for one in (*a, b[1])] == ["5 shards, s5 to s9", "shard s8"]
