"""Loaders that die, hang, crawl, leave and return: the digests of the run stay those of the undisturbed one."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable

import pytest

from tests.end_to_end.faults.conftest import Arena
from tests.end_to_end.faults.crew import Crew, meanwhile, num_connections, slowed
from tests.end_to_end.faults.run import paced
from tests.end_to_end.fleet import Pulled, wait_until

Check = Callable[[Pulled, float], None]
STEPS = 70
DEADLINE_S = 0.5
SLACK_S = 4.0
"""Above the ticket's deadline: the making of a piece, on a machine that does other work too."""


def test_sigkill_at_random_moments(arena: Arena, crew: Crew, check_run: Check) -> None:
    """Three kills of either loader, each started again while the run goes on."""
    chance = random.Random(20)
    kills = sorted(chance.sample(range(5, STEPS - 10), 3))

    def kill_and_restart() -> None:
        number = chance.randrange(2)
        time.sleep(chance.uniform(0, 0.03))  # anywhere within a step
        crew.kill(number)
        crew.start(number)

    check_run(paced(arena.config, crew.addresses, dict.fromkeys(kills, kill_and_restart)), DEADLINE_S + SLACK_S)


def test_sigstop_of_a_loader(arena: Arena, crew: Crew, check_run: Check) -> None:
    """It hangs, the other one takes over; it wakes up and sends what nobody waits for any more."""
    events = {
        20: lambda: crew.signal(0, signal.SIGSTOP),
        50: lambda: crew.signal(0, signal.SIGCONT),
    }
    check_run(paced(arena.config, crew.addresses, events, ranks=2), DEADLINE_S + SLACK_S)


@pytest.mark.slow
def test_a_loader_at_a_tenth_of_its_speed(arena: Arena, crew: Crew, check_run: Check) -> None:
    with slowed(crew.pid(0), share=0.1):
        check_run(paced(arena.config, crew.addresses, {}), DEADLINE_S + SLACK_S)


def test_all_loaders_gone_and_one_returns(arena: Arena, crew: Crew, check_run: Check) -> None:
    """The run waits, and goes on where it was."""

    returning = threading.Timer(1.0, lambda: crew.start(1))

    def all_gone() -> None:
        crew.kill(0)
        crew.kill(1)
        returning.start()

    pulled = paced(arena.config, crew.addresses, {30: all_gone})
    returning.join()
    check_run(pulled, 1.0 + 3.0 + SLACK_S)


def test_a_rolling_restart_of_the_whole_fleet_costs_no_time_out(arena: Arena, crew: Crew, check_run: Check) -> None:
    """G13: a drained loader answers what it was asked for, so that no ticket comes near its deadline of a minute."""
    begun, ended = threading.Event(), threading.Event()

    def roll() -> None:
        assert begun.wait(300)
        try:
            for number in range(2):
                assert crew.drain(number) == 0
                crew.start(number)
                # of both ranks one may be done with its epoch by now; the other one is held
                wait_until(lambda: num_connections(crew.pid(number)) > 0, 60, "a rank dials again")  # noqa: B023
        finally:
            ended.set()

    def hold() -> None:
        assert ended.wait(300), "the run was over before the fleet was restarted"

    with meanwhile(roll):
        pulled = paced(
            arena.config,
            crew.addresses,
            {5: begun.set, STEPS - 5: hold},
            "trainer.feed.ticket_deadline_s=60",
            step_s=0.05,
            ranks=2,
        )
    check_run(pulled, SLACK_S)
