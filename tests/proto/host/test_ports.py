"""A free port stays free until it is bound: the kernel gives it to no outgoing connection."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from stoker_proto.host import ports
from stoker_proto.host.ports import free_port, outside_connections


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_it_is_free_and_no_connections(address: str) -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    port = free_port(address)
    assert port < low or port > high
    with socket.create_server((address, port)), pytest.raises(OSError, match="in use"):
        socket.create_server((address, port))


def test_a_port_in_use_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1]
        probe.close()
        monkeypatch.setattr(ports, "outside_connections", lambda: [taken.getsockname()[1], free])
        assert {free_port() for _ in range(20)} == {free}


def test_where_connections_take_every_port_the_kernel_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "_CONNECTIONS", tmp_path / "range")
    assert outside_connections() == []
    assert free_port() > 0
