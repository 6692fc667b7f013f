"""A loader with few descriptors, and strangers who take all that they can get: no sample is lost, and none is called bad."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loader_service.server.listening import can_drop_resets
from tests.end_to_end.fleet import Loader, pull, serving, wait_until, write_config

LIMIT = 160
STRANGERS = 300
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + b"\x00" + bytes(31)
"""Of ZMTP 3.1, NULL, a client: half a handshake."""


class Strangers:
    """Many connections that say nothing, or half a handshake, and come back when they are closed."""

    def __init__(self, loader: Loader) -> None:
        host, _, port = loader.address.removeprefix("tcp://").rpartition(":")
        self._place = host, int(port)
        self._over = threading.Event()
        self.num_opened = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        open_ones: list[socket.socket] = []
        while not self._over.wait(0.001):
            if len(open_ones) < STRANGERS:
                open_ones.append(self._connect())
                continue
            closed, _, _ = select.select(open_ones, [], [], 0.1)
            for one in closed:
                try:
                    ended = one.recv(1 << 16) == b""
                except OSError:
                    ended = True
                if ended:
                    one.close()
                    open_ones.remove(one)
        for one in open_ones:
            one.close()

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._place, timeout=30)
        if self.num_opened % 2:
            connection.send(GREETING)
        self.num_opened += 1
        return connection

    def end(self) -> None:
        self._over.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def strangers_at(loader: Loader) -> Iterator[Strangers]:
    strangers = Strangers(loader)
    try:
        yield strangers
    finally:
        strangers.end()


def few_descriptors(soft: int, hard: int) -> tuple[str, ...]:
    return "sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh"


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("workers", [1, 2])
def test_strangers_take_no_sample_and_make_none_bad(
    tmp_path: Path, model: Path, demos: Path, workers: int, policy: str
) -> None:
    config = write_config(tmp_path, model, [demos], on_bad_sample=policy)
    with serving(config) as loader:
        expected = pull(config, [loader.address])
    log = tmp_path / "log"
    options = ("--set", f"loader.workers={workers}", "--set", "loader.threads=2", "--set", "loader.read_ahead=false")
    with (
        serving(config, *options, prefix=few_descriptors(LIMIT // 2, LIMIT), log=log) as loader,
        strangers_at(loader) as strangers,
    ):
        wait_until(lambda: strangers.num_opened > 2 * STRANGERS, 60, "strangers that come back")
        before = strangers.num_opened
        found = pull(config, [loader.address])
        assert (found.keys, found.steps, found.skipped) == (expected.keys, expected.steps, [])
        wait_until(lambda: strangers.num_opened > before, 60, "strangers that came meanwhile")
        assert loader.process.poll() is None
    share = 2 if can_drop_resets() else 4  # with a relay, which needs two descriptors for each connection
    assert f"{LIMIT // share} connections are open" in log.read_text()
