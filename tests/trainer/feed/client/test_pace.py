"""How long is waited for a loader, who is hedged, who is home to how many lanes: lists of events and literal numbers."""

from __future__ import annotations

from collections import Counter

from stoker_proto.wire.messages import Ticket
from tests.trainer.feed.client.core_driver import CoreDriver, make_options
from trainer.feed.client.explain import describe
from trainer.feed.client.homes import Homes
from trainer.feed.client.pace import BURST, NO_LANES, HedgeBudget, LaneShares, Latencies, Load, Pace

TICKET = Ticket(ticket=0, split="train", epoch=0, lane=1, start=0, count=1)
INF = float("inf")


def answered(latencies: Latencies, loader: int, seconds: float, times: int) -> None:
    for _ in range(times):
        latencies.answered(loader, TICKET, seconds)


def test_waits_follow_what_loaders_take_and_not_what_a_slow_one_takes() -> None:
    latencies = Latencies(make_options(2))
    assert latencies.waits(0, TICKET) == (INF, 10.0)
    answered(latencies, 0, 0.5, 7)
    assert latencies.waits(0, TICKET) == (INF, 10.0)
    answered(latencies, 0, 0.5, 1)
    assert latencies.waits(0, TICKET) == (1.5, 4.0)
    answered(latencies, 1, 0.125, 8)
    assert latencies.waits(1, TICKET) == (1.5, 4.0)  # as long as the best of the others takes at worst
    answered(latencies, 0, 0.125, 64)
    assert latencies.waits(1, TICKET) == (0.375, 1.0)
    for _ in range(24):
        latencies.gave_up(1, 9.0)
    assert latencies.waits(1, TICKET) == (27.0, 10.0)  # by then it is what this loader usually takes
    latencies.forget(1)
    assert latencies.waits(1, TICKET) == (INF, 4.0)


def test_a_lane_that_is_new_to_a_loader_is_waited_for_four_times_as_long() -> None:
    latencies = Latencies(make_options(1))
    answered(latencies, 0, 0.01, 8)
    assert latencies.waits(0, TICKET) == (0.2, 1.0)
    assert latencies.waits(0, Ticket(ticket=0, split="train", epoch=1, lane=1, start=0, count=1)) == (0.8, 4.0)


def test_hedges_are_a_share_and_a_burst() -> None:
    budget = HedgeBudget(0.25)
    assert [budget.spend() for _ in range(BURST + 1)] == [True] * BURST + [False]
    for _ in range(4):
        budget.ticket()
    assert (budget.spend(), budget.spend()) == (True, False)
    for _ in range(1000):
        budget.ticket()
    assert sum(budget.spend() for _ in range(100)) == BURST
    assert not HedgeBudget(0).spend()


def test_backoff_begins_with_the_second_failure_doubles_and_ends() -> None:
    shares, now, seen = LaneShares(make_options(1, backoff_s=5.0)), 0.0, []
    for _ in range(6):
        shares.joined(0, now)
        seen.append(shares.of[0].excluded_until - now)
        shares.failed(0, now)
    assert seen == [-INF, -INF, 1.0, 2.0, 4.0, 5.0]
    shares.joined(0, now)
    assert shares.level(0, now) == NO_LANES
    now += 60
    assert shares.level(0, now) == 0
    shares.failed(0, now)
    shares.joined(0, now)
    assert shares.level(0, now) == 0


def test_relief_ends_level_by_level_and_lasts_longer_where_it_was_needed_again() -> None:
    shares = LaneShares(make_options(1))
    assert shares.lower(0, 2, 0.0)
    assert not shares.lower(0, 5, 0.1)
    assert shares.ended_holds(9.9) == []
    shares.restore(0, 10.0, still_slow=True)
    assert (shares.level(0, 10.0), shares.ended_holds(19.9)) == (2, [])
    shares.restore(0, 20.0, still_slow=False)
    assert shares.level(0, 20.0) == 1
    assert shares.lower(0, 99, 21.0)
    assert (shares.level(0, 21.0), shares.ended_holds(40.9), shares.ended_holds(41.0)) == (NO_LANES, [], [0])


def test_shares_of_lanes_are_halved_by_each_level() -> None:
    homes = Homes(("tcp://a:1", "tcp://b:1", "tcp://c:1"), 32)

    def shares(*levels: int) -> list[int]:
        count = Counter(lane[0] for lane in homes(0, dict(enumerate(levels))))
        return [count[n] for n in range(len(levels))]

    assert shares(0, 1) == [22, 10]
    assert shares(0, 4) == [31, 1]
    assert shares(0, NO_LANES) == [32, 0]
    assert shares(3, NO_LANES) == [32, 0]
    assert shares(2, 2) == shares(NO_LANES, NO_LANES) == [16, 16]
    assert sum(shares(0, 1, 1)) == 32
    both, lowered = homes(0, {0: 0, 1: 0}), homes(0, {0: 0, 1: 1})
    assert all(before[0] == 1 for before, after in zip(both, lowered, strict=True) if after[0] == 1)


def run_load(paces: tuple[float, float], *, starving: bool) -> set[tuple[int, int]]:
    """Two loaders that are owed a ticket at once and answer at these paces, until both have; for 20 s."""
    load, now, found = Load(make_options(2), 0.0), 0.0, set()
    while now < 20:
        load.starving(starving, now)
        for loader in (0, 1):
            load.asked(loader, now)
        first, last = sorted((0, 1), key=lambda loader: -paces[loader])
        load.settled(first, 1, now + 1 / paces[first])
        now += 1 / paces[last]
        load.settled(last, 1, now)
        found |= set(load.look(now, lambda loader, other: loader != other) or [])
    return found


def test_only_a_loader_many_times_slower_than_an_idle_one_is_overloaded() -> None:
    assert run_load((20.0, 18.0), starving=True) == set()
    assert run_load((20.0, 10.0), starving=True) == set()
    assert {loader for loader, _ in run_load((40.0, 4.0), starving=True)} == {1}
    assert run_load((40.0, 4.0), starving=False) == set()
    assert {loader for loader, _ in run_load((400.0, 4.0), starving=True)} == {1}, "hardly ever busy, and measured yet"


def run_pace(pace: Pace, now: float, seconds: float, paces: dict[int, float]) -> tuple[float, list[int]]:
    """As `run_load`, where the trainer always waits: the time then, and who was relieved."""
    over, relieved = now + seconds, []
    while now < over:
        pace.load.starving(True, now)
        asks = {loader: pace.asked(loader, TICKET, 0, now) for loader in paces}
        for loader in sorted(paces, key=lambda loader: -paces[loader]):
            pace.answered(asks[loader], TICKET, now + 1 / paces[loader])
        now += 1 / min(paces.values())
        relieved += pace.look(now, lambda loader, other: loader != other)
    return now, relieved


def test_a_loader_that_is_given_lanes_again_is_judged_by_its_pace_of_today() -> None:
    pace = Pace(make_options(2, hold_s=2.0), 0.0)
    now, relieved = run_pace(pace, 0.0, 6.0, {0: 100.0, 1: 4.0})
    assert relieved == [1]
    assert pace.shares.level(1, now) == NO_LANES
    now, _ = run_pace(pace, now, 2.0, {0: 100.0})  # meanwhile it is asked for nothing
    assert pace.shares.level(1, now) == NO_LANES - 1
    now, relieved = run_pace(pace, now, 4.0, {0: 100.0, 1: 34.5})  # 2.9 times slower, and 3 are too much
    assert relieved == []


def test_a_straggler_near_the_head_is_hedged_once_and_the_first_answer_counts() -> None:
    driver = CoreDriver(2, window=4, silence_s=1e9, ping_interval_s=1e9, probe_s=1e9).connect()
    for _ in range(30):
        driver.advance(0.01)
        driver.answer()
        while driver.core._num_ready():
            driver.core.taken(1)
        driver.advance()
    open_before = driver.forget_tickets()
    driver.advance(0.9)
    hedges = driver.forget_tickets()
    assert 0 < len(hedges) <= BURST
    assert {loader for loader, _ in hedges} <= {0, 1}
    by_ticket = {ticket.ticket: loader for loader, ticket in open_before}
    assert all(by_ticket[ticket.ticket] == 1 - loader for loader, ticket in hedges)
    driver.tickets = hedges + open_before
    for _ in range(len(driver.tickets)):
        driver.answer()
    assert driver.core.tickets.counters.hedges_won == len(hedges)
    assert driver.core.tickets.counters.duplicates == len(hedges)


def test_a_loader_that_hangs_is_found_by_a_ping_when_it_owes_something() -> None:
    driver = CoreDriver(2).connect()
    driver.silent = {1}
    owed = {ticket.ticket for loader, ticket in driver.forget_tickets() if loader == 1}
    for _ in range(10):
        driver.advance(0.2)
    assert owed <= {ticket.ticket for loader, ticket in driver.tickets if loader == 0}


def test_a_flapping_loader_is_home_only_where_it_is_alone() -> None:
    driver = CoreDriver(2)
    driver.held = {0: [0, 1], 1: [0]}
    driver.connect()
    for _ in range(3):
        driver.core.lost(0, "gone", driver.now)
        driver.connect(0, start=False)
    homes = {lane: driver.core.fleet.choices(lane, 0, driver.now)[0] for lane in range(8)}
    assert set(homes.values()) == {0, 1}
    assert [homes[lane] for lane in range(8)] == [1] * 4 + [0] * 4
    assert "failed 3 times in a row: home to no lanes for 2.0 s more" in describe(driver.core.fleet, driver.now)
