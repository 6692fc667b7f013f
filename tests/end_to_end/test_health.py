"""/livez, /readyz and what systemd is told: of real loaders, through every phase of their lives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zmq

from loader_service.server.health import Health
from loader_service.server.pool import InlinePool
from loader_service.server.served import Served
from loader_service.server.server import LoaderServer
from stoker_proto.fleet.pages import Page, Pages
from stoker_proto.host.files import open_lock_file, try_lock
from stoker_proto.host.ports import free_port
from stoker_proto.host.systemd import Notifier
from tests.end_to_end.fleet import ROOT, environment, wait_until
from tests.trainer.feed.fake_loader import make_config


def get(port: int, path: str) -> tuple[int, str]:
    """(status, text); (0, "") where nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that systemd would listen on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(120)
        yield listener


def receive_all(listener: socket.socket) -> list[str]:
    """What has come so far."""
    found = []
    listener.setblocking(False)
    try:
        while True:
            found.append(listener.recv(4096).decode())
    except BlockingIOError:
        return found
    finally:
        listener.settimeout(120)


def test_a_loader_says_when_it_is_ready_that_it_works_and_that_it_ends(
    config: Path, tmp_path: Path, systemd: socket.socket
) -> None:
    port, cache = free_port(), tmp_path / "cache"
    cache.mkdir()
    lock = open_lock_file(cache / "lock")
    assert try_lock(lock)  # as another loader that prepares the same data would have it
    command = [
        sys.executable,
        "-m",
        "loader_service.cli",
        "serve",
        "--config",
        str(config),
        "--bind",
        "tcp://127.0.0.1:*",
    ]
    variables = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
    loader = subprocess.Popen(
        [*command, "--health", f"127.0.0.1:{port}"], cwd=ROOT, env=environment(**variables), stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: get(port, "/livez")[0] == 200, 120, "the loader listens")
        assert get(port, "/readyz") == (503, "not ready: the data is being prepared\n")
        assert receive_all(systemd) == []
        os.close(lock)  # the other one has prepared
        assert systemd.recv(4096).decode().startswith("READY=1\nSTATUS=serving at tcp://127.0.0.1:")
        assert [systemd.recv(4096) for _ in range(2)] == [b"WATCHDOG=1"] * 2
        assert get(port, "/readyz") == (200, "ready\n")
        assert get(port, "/livez") == (200, "live\n")
        assert get(port, "/metrics")[0] == 404, "not asked for"

        loader.send_signal(signal.SIGSTOP)
        wait_until(
            lambda: "T" in Path(f"/proc/{loader.pid}/stat").read_text().rpartition(")")[2].split()[0], 60, "a stop"
        )
        receive_all(systemd)
        time.sleep(2.5)  # longer than WATCHDOG_USEC: systemd would have ended it
        assert receive_all(systemd) == []
        loader.send_signal(signal.SIGCONT)
        assert systemd.recv(4096) == b"WATCHDOG=1"

        loader.send_signal(signal.SIGTERM)
        while (last := systemd.recv(4096)) == b"WATCHDOG=1":
            pass
        assert last == b"STOPPING=1\nSTATUS=draining"
        assert loader.wait(60) == 0
    finally:
        loader.kill()
        loader.wait()


def test_a_loop_that_hangs_is_not_live_and_feeds_no_watchdog(tmp_path: Path, systemd: socket.socket) -> None:
    """The process lives on, and so do its other threads."""
    health = Health(Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}), stalled_s=1.0)
    with zmq.Context() as context:
        served = Served(make_config(["tcp://nobody:1"]), {}, {}, "{}", {}, "hanging")
        pool = InlinePool(tmp_path, 1)
        wake, pool.readable = socket.socketpair()  # a pool that never has an answer
        server = LoaderServer(served, tmp_path, pool, context)
        server.on_look = lambda: health.turned(draining=server.is_draining)
        pool.receive = lambda: None  # type: ignore[method-assign]
        pages = Pages({"/livez": health.live, "/readyz": health.ready})
        with closing(server), closing(pages), wake, pool.readable:
            port = int(pages.start("127.0.0.1:0", "--health").rpartition(":")[2])
            health.serving(server.bind("tcp://127.0.0.1:*"))
            loop = threading.Thread(target=server.run)
            loop.start()
            goes_on = threading.Event()
            try:
                assert systemd.recv(4096).startswith(b"READY=1")
                assert systemd.recv(4096) == b"WATCHDOG=1"
                assert get(port, "/readyz") == (200, "ready\n")
                with pytest.raises(TimeoutError):
                    server.calls.call(goes_on.wait, 0.1)  # the loop hangs in it
                wait_until(lambda: get(port, "/livez")[0] == 503, 60, "a stalled loop")
                receive_all(systemd)
                assert get(port, "/readyz")[1].startswith("the serving loop has not come round for ")
                time.sleep(2.0)
                assert receive_all(systemd) == []
                goes_on.set()
                assert systemd.recv(4096) == b"WATCHDOG=1"
                wait_until(lambda: get(port, "/readyz")[0] == 200, 60, "a loop that goes on")
            finally:
                goes_on.set()
                server.stop()
                loop.join(60)
            assert not loop.is_alive()


def test_peers_that_hold_connections_do_not_shut_a_probe_out() -> None:
    with closing(Pages({"/livez": lambda: Page(200, "live\n")})) as pages:
        port = int(pages.start("127.0.0.1:0", "--health").rpartition(":")[2])
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        try:
            assert get(port, "/livez") == (200, "live\n")
            assert get(port, "/passwd") == (404, "there is /livez\n")
        finally:
            for connection in held:
                connection.close()


def test_an_abstract_socket_and_a_watchdog_for_another_process() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(b"\0stoker-test-%d" % id(listener))
        name = "@" + listener.getsockname()[1:].decode()
        notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"})
        assert notifier.watchdog_s is None
        assert notifier.send("READY=1", "STATUS=x")
        assert listener.recv(100) == b"READY=1\nSTATUS=x"
    assert not notifier.send("READY=1"), "nobody listens any more"
    assert Notifier({}).send("READY=1")
