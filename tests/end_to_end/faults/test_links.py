"""A loader behind a real link of the kernel's: the cable is pulled, packets are lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tests.end_to_end.faults import namespaces
from tests.end_to_end.faults.conftest import Arena
from tests.end_to_end.faults.crew import Crew
from tests.end_to_end.faults.namespaces import Link
from tests.end_to_end.faults.run import paced
from tests.end_to_end.fleet import Pulled, serving

Check = Callable[[Pulled, float], None]
SLACK_S = 5.0


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    if (why := namespaces.problem()) is not None:
        pytest.skip(f"no network namespace: {why}")
    with namespaces.namespace() as link:
        yield link


@pytest.fixture(scope="module")
def far(arena: Arena, link: Link) -> Iterator[str]:
    """The address of a loader in the namespace."""
    with serving(arena.config, "--insecure", "--bind", f"tcp://{link.there}:5599", prefix=link.prefix) as loader:
        yield loader.address


@pytest.fixture(autouse=True)
def _mended(link: Link) -> Iterator[None]:
    yield
    link.up()
    link.lose_nothing()


def test_a_pulled_cable_beside_a_healthy_loader(
    arena: Arena, crew: Crew, link: Link, far: str, check_run: Check
) -> None:
    check_run(paced(arena.config, [far, crew.addresses[0]], {20: link.down, 50: link.up}, ranks=2), 0.5 + SLACK_S)


@pytest.mark.slow
def test_a_pulled_cable_of_the_only_loader_is_plugged_in_again(
    arena: Arena, link: Link, far: str, check_run: Check
) -> None:
    """Down for longer than ZeroMQ's heartbeats wait (1.5 s): the connection is given up, and made anew."""
    plug = threading.Timer(2.5, link.up)

    def pull_the_cable() -> None:
        link.down()
        plug.start()

    pulled = paced(arena.config, [far], {20: pull_the_cable})
    plug.join()
    check_run(pulled, 2.5 + SLACK_S)


def test_lost_packets(arena: Arena, link: Link, far: str, check_run: Check) -> None:
    how: list[str | None] = []
    pulled = paced(arena.config, [far], {10: lambda: how.append(link.lose(5))}, ranks=2)
    if how == [None]:
        pytest.skip("no packet loss: this kernel has neither netem nor tbf (tc qdisc)")
    assert link.num_dropped() > 0, how
    check_run(pulled, SLACK_S)
