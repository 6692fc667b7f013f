"""Entries of cluster.loader_addresses -> addresses; what the core does with those that join and leave."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker_proto.config import ClusterConfig
from stoker_proto.errors import ConfigError
from tests.trainer.feed.client.core_driver import EXPECTED, CoreDriver
from trainer.feed.client import explain
from trainer.feed.discovery import MOST_ADDRESSES, Discovery, Found, is_fixed, look_up


def test_kinds_of_entries() -> None:
    entries = "tcp://a:1", "dns://loaders:5555", "file:loaders.txt", "file:///etc/loaders"
    assert [is_fixed(entry) for entry in entries] == [True, False, False, False]
    assert look_up("tcp://a:1") == ("tcp://a:1",)
    ClusterConfig(loader_addresses=entries).check()


@pytest.mark.parametrize(
    "entry", ["dns://loaders", "dns://:5555", "dns://loaders:0", "dns://loaders:65536", "dns:loaders:5", "file:"]
)
def test_entries_that_name_nothing(entry: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"cluster.loader_addresses holds {entry!r}: write")):
        ClusterConfig(loader_addresses=(entry,)).check()


def test_each_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one order on all ranks, each once, IPv6 in brackets."""

    def getaddrinfo(name: str, port: int, type: socket.SocketKind) -> list[tuple[object, ...]]:
        assert (name, port) == ("loaders", 5555)
        hosts = ["10.0.0.7", "10.0.0.2", "fd00::3", "10.0.0.7"]
        return [(socket.AF_INET, type, 6, "", (host, port)) for host in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert look_up("dns://loaders:5555") == ("tcp://10.0.0.2:5555", "tcp://10.0.0.7:5555", "tcp://[fd00::3]:5555")


def test_what_can_be_no_name_is_said_and_the_other_entries_are_used(tmp_path: Path) -> None:
    path = tmp_path / "loaders"
    path.write_text("tcp://10.0.0.2:5555\n")
    long = "a" * 64
    discovery = Discovery(["dns://loader..svc:5555", f"dns://{long}:5555", f"file:{path}"], 5.0, lambda found: None)
    assert discovery.look() == Found(
        ("tcp://10.0.0.2:5555",),
        {
            "dns://loader..svc:5555": "[Errno -2] 'loader..svc' is no name of a host: label empty or too long",
            f"dns://{long}:5555": f"[Errno -2] '{long}' is no name of a host: label too long",
        },
    )


def test_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "loaders"
    path.write_text("# the first rack\n\ntcp://10.0.0.2:5555\n  tcp://[fd00::3]:5556   # slow\n")
    assert look_up(f"file:{path}") == ("tcp://10.0.0.2:5555", "tcp://[fd00::3]:5556")
    for line in "10.0.0.2:5555", "tcp://10.0.0.2", "tcp://10.0.0.2:0", "tcp://:5":
        path.write_text(f"tcp://10.0.0.2:5555\n{line}\n")
        with pytest.raises(ConfigError, match=re.escape(f"{path}:2: {line!r} is not tcp://HOST:PORT")):
            look_up(f"file:{path}")
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        look_up(f"file:{path}")


def test_a_look_that_fails_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "loaders"
    entry = f"file:{path}"
    discovery = Discovery(["tcp://a:1", entry], 5.0, lambda found: None)
    assert discovery.look() == Found(("tcp://a:1",), {entry: f"[Errno 2] No such file or directory: '{path}'"})
    path.write_text("tcp://b:1\ntcp://a:1\n")
    assert discovery.look() == Found(("tcp://a:1", "tcp://b:1"), {})
    path.unlink()
    for _ in range(3):
        assert discovery.look() == Found(("tcp://a:1", "tcp://b:1"), {})
    assert caplog.messages == [f"{entry}: [Errno 2] No such file or directory: '{path}'; the 2 loaders found last stay"]
    path.write_text("# none now\n")
    assert discovery.look() == Found(("tcp://a:1",), {entry: "no line names an address"})
    path.write_text("".join(f"tcp://10.0.0.1:{port}\n" for port in range(1, 2000)))
    for _ in range(3):
        assert len(discovery.look().addresses) == MOST_ADDRESSES == 1024
    assert caplog.messages[1:] == ["cluster.loader_addresses names 2000 loaders: the first 1024 are used"]


def test_it_tells_what_changed_and_nothing_else(tmp_path: Path) -> None:
    path, told, changed = tmp_path / "loaders", list[tuple[str, ...]](), threading.Semaphore(0)
    path.write_text("tcp://a:1\n")

    def tell(found: Found) -> None:
        told.append(found.addresses)
        changed.release()

    discovery = Discovery([f"file:{path}"], 0.01, tell)
    discovery.start()
    try:
        assert changed.acquire(timeout=60)
        new = tmp_path / "new"
        new.write_text("tcp://b:1\n")
        new.replace(path)
        assert changed.acquire(timeout=60)
    finally:
        discovery.close()
    assert told == [("tcp://a:1",), ("tcp://b:1",)]


@pytest.fixture
def driver() -> Iterator[CoreDriver]:
    """One loader that trains, and room for more."""
    driver = CoreDriver(1).connect()
    yield driver
    assert driver.error is None


def join(driver: CoreDriver, address: str, name: str) -> int:
    number = driver.core.join(address)
    driver.held[number], driver.names[number] = [0, 1], name
    driver.fingerprints[number] = driver.fingerprints[0]
    driver.core.connected(number, driver.now)
    driver.advance()
    return number


def test_a_loader_that_joins_takes_over_when_the_first_is_lost(driver: CoreDriver) -> None:
    assert join(driver, "tcp://new:5555", "new") == 1
    assert not driver.core.leave(0, driver.now), "it is connected: it answers its last tickets"
    driver.core.lost(0, "the connection broke", driver.now)
    driver.forget_tickets()
    assert driver.core.leave(0, driver.now)
    driver.advance()
    assert {loader for loader, _ in driver.tickets} == {1}
    driver.finish()
    assert driver.keys() == EXPECTED
    assert "tcp://loader0:5555" not in explain.describe(driver.core.fleet, driver.now)


@pytest.mark.long
def test_the_number_of_a_loader_that_left_is_used_again(driver: CoreDriver) -> None:
    """Nothing known of the last one counts against the next: pods come and go for weeks, each with an address of its own."""
    core = driver.core
    first = join(driver, "tcp://pod1:5555", "pod1")
    for pod in range(2, 50):
        core.lost(first, "the connection broke", driver.now)  # it failed many times in a row
        assert core.leave(first, driver.now)
        driver.tickets = [(loader, ticket) for loader, ticket in driver.tickets if loader != first]
        assert join(driver, f"tcp://pod{pod}:5555", f"pod{pod}") == first
        assert core.pace.shares.level(first, driver.now) == 0
        fresh = CoreDriver(2, addresses=tuple(core.fleet.addresses)).connect()
        for lane in range(2 * driver.options.order.lanes):  # as a rank that starts now has them
            assert core.fleet.choices(lane, 0, driver.now) == fresh.core.fleet.choices(lane, 0, fresh.now)
    assert core.fleet.addresses == ["tcp://loader0:5555", "tcp://pod49:5555"]
    driver.finish()
    assert driver.keys() == EXPECTED


def test_what_one_loader_failed_at_the_next_one_of_its_number_may_try() -> None:
    driver = CoreDriver(2).connect()
    core, number = driver.core, join(driver, "tcp://pod1:5555", "pod1")
    for _ in range(len(driver.tickets)):  # until one goes to the new loader before the other old one
        driver.fail(0, "unavailable")
        if driver.tickets[-1][0] == number:
            driver.fail(-1, "unavailable")
            break
    tried = [pending for pending in core.tickets._pending.values() if number in pending.tried]
    assert len(tried) == 1
    core.lost(number, "the connection broke", driver.now)
    assert core.leave(number, driver.now)
    assert core.join("tcp://pod2:5555") == number
    assert not any(number in pending.tried for pending in tried)


def test_a_loader_that_differs_and_leaves_is_forgotten(driver: CoreDriver) -> None:
    number = driver.core.join("tcp://other:5555")
    driver.held[number], driver.names[number] = [0, 1], "other"
    driver.fingerprints[number] = dict.fromkeys(driver.fingerprints[0], "another")
    driver.core.connected(number, driver.now)
    driver.advance()
    assert any("tcp://other:5555" in text for text in driver.warnings)
    assert driver.core.leave(number, driver.now)


def test_what_names_no_loader_is_said() -> None:
    driver = CoreDriver(0)
    driver.core.not_found({"dns://loaders:5555": "Name or service not known"})
    driver.advance(61.0)
    assert "loaders: dns://loaders:5555 names none now (Name or service not known)" in str(driver.error)
