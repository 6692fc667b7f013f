"""A network that delays, throttles, breaks, swallows and garbles: between a real loader and a real client stands a proxy.

With keys, so that a garbled byte cannot go unseen: without, TCP's own checksum is all there is (PROTOCOL.md, *Not promised*).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.faults.conftest import Arena
from tests.end_to_end.faults.crew import Crew
from tests.end_to_end.faults.proxy import FaultyProxy
from tests.end_to_end.faults.run import paced
from tests.end_to_end.fleet import Pulled, run_cli

Check = Callable[[Pulled, float], None]
SLACK_S = 5.0
DEADLINE_S = 0.5
HEALS_AFTER_S = 1.0


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    for name in ("loader", "rank"):
        assert run_cli("keys", "--out", str(folder), "--name", name).returncode == 0
    return folder


@pytest.fixture(scope="module")
def locked(arena: Arena, keys: Path) -> Iterator[Crew]:
    """Two loaders with keys."""
    security = f"loader_secret={keys}/loader.key_secret", f"allowed_ranks=[{keys}/rank.key]"
    with Crew(arena.config, 2, *[f"--set=cluster.security.{value}" for value in security]) as crew:
        yield crew


@pytest.fixture
def proxy(locked: Crew) -> Iterator[FaultyProxy]:
    """Before the first of them."""
    with FaultyProxy(locked.addresses[0]) as proxy:
        yield proxy


FAULTS: dict[str, Callable[[FaultyProxy], object]] = {
    "delay": lambda proxy: setattr(proxy.down, "delay_s", 0.3),
    "throttle": lambda proxy: setattr(proxy.down, "rate", 20_000),
    "cut": lambda proxy: proxy.cut(),
    "unreachable": lambda proxy: (setattr(proxy, "refuse", True), proxy.cut()),
    "half-open": lambda proxy: setattr(proxy, "half_open", True),
    "truncate": lambda proxy: setattr(proxy.down, "truncate", 0.2),
    "duplicate": lambda proxy: setattr(proxy.down, "duplicate", 0.2),
    "corrupt": lambda proxy: setattr(proxy.down, "corrupt", 0.2),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("delay", marks=pytest.mark.slow),
        pytest.param("throttle", marks=pytest.mark.slow),
        "half-open",
        "truncate",
        "corrupt",
    ],
)
def test_a_sick_connection_beside_a_healthy_one(
    fault: str, arena: Arena, keys: Path, locked: Crew, proxy: FaultyProxy, check_run: Check
) -> None:
    pulled = paced(
        arena.config,
        [proxy.address, locked.addresses[1]],
        {15: lambda: FAULTS[fault](proxy), 40: proxy.heal},
        *rank_side(keys),
        ranks=2,
    )
    assert proxy.down.bytes_seen > 50_000, "the proxy had nothing to harm"
    if fault in ("truncate", "corrupt"):
        assert proxy.down.num_harmed
    check_run(pulled, DEADLINE_S + SLACK_S)


@pytest.mark.parametrize(
    "fault",
    [
        "cut",
        pytest.param("unreachable", marks=pytest.mark.slow),
        pytest.param("half-open", marks=pytest.mark.slow),
        pytest.param("duplicate", marks=pytest.mark.slow),
        pytest.param("corrupt", marks=pytest.mark.slow),
    ],
)
def test_the_only_connection_is_sick_and_heals(
    fault: str, arena: Arena, keys: Path, proxy: FaultyProxy, check_run: Check
) -> None:
    healing = threading.Timer(HEALS_AFTER_S, proxy.heal)

    def harm() -> None:
        FAULTS[fault](proxy)
        healing.start()

    pulled = paced(arena.config, [proxy.address], {15: harm}, *rank_side(keys))
    healing.join()
    assert proxy.num_connections > 1
    check_run(pulled, HEALS_AFTER_S + DEADLINE_S + SLACK_S)


def rank_side(keys: Path) -> list[str]:
    """Overrides of a rank with keys."""
    return [f"cluster.security.loader_key={keys}/loader.key", f"cluster.security.rank_secret={keys}/rank.key_secret"]
