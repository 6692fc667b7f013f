"""Two launchers that meet over real sockets, with keys."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import zmq

from deploy.nodes import meeting
from deploy.nodes.coordinator import ENDED, FACTS
from deploy.nodes.meeting import Guest, Host
from stoker_proto.config.security import SecurityConfig
from stoker_proto.errors import ConfigError
from stoker_proto.host.ports import free_port
from stoker_proto.wire.keys import write_pair
from tests.end_to_end.fleet import wait_until

HERE = "127.0.0.1"
WAIT_S = 60.0


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    for name in ("loader", "rank", "stranger"):
        write_pair(tmp_path / "keys", name, *zmq.curve_keypair())
    return tmp_path / "keys"


def security(keys: Path, rank: str = "rank") -> SecurityConfig:
    return SecurityConfig(
        loader_secret=f"{keys}/loader.key_secret",
        allowed_ranks=(f"{keys}/rank.key",),
        loader_key=f"{keys}/loader.key",
        rank_secret=f"{keys}/{rank}.key_secret",
    )


def facts(node: int) -> dict[str, Any]:
    return {"host": f"h{node}", "address": HERE, "devices": node, "versions": {}, "config": {}}


def test_nodes_agree_and_a_stranger_hears_nothing(keys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port(HERE)
    said = ""

    def refused() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "refused a launcher: its public key" in said

    with Host(HERE, port, 2, WAIT_S, security(keys)) as host:
        host.give(FACTS, facts(0))
        with Guest(1, HERE, port, WAIT_S, security(keys, "stranger")) as stranger:
            stranger.give(FACTS, facts(1))
            wait_until(refused, WAIT_S, "the refusal")
            assert "node 0 does not answer" in stranger.missing()
            assert "nodes [1] have not come" in host.missing()
        with Guest(1, HERE, port, WAIT_S, security(keys)) as guest:
            guest.give(FACTS, facts(1))
            wait_until(lambda: guest.agreed(FACTS) and host.agreed(FACTS), WAIT_S, "the first round")
            shown = [{"host": f"h{node}", "address": HERE, "devices": node} for node in range(2)]
            assert guest.agreed(FACTS) == host.agreed(FACTS) == shown
            guest.give(ENDED, 75)
            guest.pass_on(stop=15)
            wait_until(lambda: host.failed == (1, 75) and host.stop == 15, WAIT_S, "the guest's state")
            host.pass_on(stop=signal.SIGINT, save=True)
            wait_until(lambda: guest.save, WAIT_S, "node 0's own state")
            host.give_up("no disk", 3)
            wait_until(lambda: guest.aborted, WAIT_S, "the abort")
            assert guest.aborted == {"reason": "no disk", "code": 3}


def test_a_guest_whose_node_0_goes_silent_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_LEAVE_S", 0.1)  # node 0 does not wait for the guest, as if it were killed
    port = free_port(HERE)
    with Guest(1, HERE, port, 1.0, SecurityConfig()) as guest:
        guest.give(FACTS, facts(1))
        with Host(HERE, port, 2, WAIT_S, SecurityConfig()):
            wait_until(lambda: "node 0 waits for further nodes" in guest.missing(), WAIT_S, "an answer")
            guest_left = guest.aborted
        assert guest_left is None
        wait_until(lambda: guest.aborted, WAIT_S, "the end")
        assert guest.aborted is not None
        assert guest.aborted["reason"].startswith(
            f"node 0 (tcp://{HERE}:{port}) has not answered for 1 s (--node-lost-s)"
        )


def test_node_0_somewhere_else_and_a_port_that_is_taken(keys: Path) -> None:
    with pytest.raises(ConfigError, match="this host has no such address, and node 0 is where --master-addr or"):
        Host("203.0.113.7", 29400, 1, WAIT_S, SecurityConfig())
    port = free_port(HERE)
    taken = rf"cannot meet at tcp://{HERE}:{port} \(Address already in use\)"
    with Host(HERE, port, 1, WAIT_S, SecurityConfig()), pytest.raises(ConfigError, match=taken):
        Host(HERE, port, 1, WAIT_S, security(keys))
