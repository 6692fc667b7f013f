"""Worker processes that die: each is noticed and started again, but not for ever."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from loader_service.pieces.builder import Counters
from loader_service.pieces.worker import ENDPOINT
from loader_service.server.pool import WorkerPool
from stoker_proto.errors import ConfigError, StokerError
from stoker_proto.wire.messages import Ticket
from tests.end_to_end.fleet import wait_until

READY = """
import sys, msgpack, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.setsockopt(zmq.IDENTITY, sys.argv[2].encode())
socket.connect(f"ipc://{sys.argv[1]}")
socket.send_multipart([b"", b"ready", bytes.fromhex(sys.argv[3])])
socket.recv_multipart()
"""
"""A worker that says that it is ready, and ends with the first message."""
TICKET = Ticket(ticket=0, split="train", epoch=0, lane=0, start=0, count=1)
HANGS = "import time; time.sleep(600)"
DIES = "raise SystemExit(3)"


class ScriptedPool(WorkerPool):
    """Its workers are these programs, one after another; the last one again and again."""

    programs: list[str]

    def _spawn(self, index: int) -> subprocess.Popen[bytes]:
        program = self.programs.pop(0) if len(self.programs) > 1 else self.programs[0]
        counters = msgpack.packb(Counters().as_list()).hex()
        endpoint = str(self._run_dir / ENDPOINT)
        return subprocess.Popen([sys.executable, "-S", "-c", program, endpoint, str(index), counters])


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ScriptedPool]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = ScriptedPool(context, tmp_path, 1, 1)
    yield made
    made.stop()
    context.destroy(linger=0)


def replaced(pool: ScriptedPool) -> int:
    """Looks, as the front does, until a worker was replaced; its exit code."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pool.receive()
        process = pool._processes[0]
        if pool.replace_dead():
            assert process.returncode is not None
            return process.returncode
        time.sleep(0.01)
    raise AssertionError("nothing was replaced")


def all_replaced(pool: ScriptedPool, count: int) -> list[int]:
    return [replaced(pool) for _ in range(count)]


@pytest.mark.process
def test_a_worker_that_dies_before_it_is_ready_again_is_replaced(pool: ScriptedPool) -> None:
    pool.programs = [_with_path(READY), DIES, DIES, _with_path(READY)]
    pool.start(60)
    assert pool.send(0, b"rank", TICKET, b"ends it")
    assert all_replaced(pool, 3) == [0, 3, 3]
    end = time.monotonic() + 60
    while not pool.send(0, b"rank", TICKET, b"ticket"):
        pool.receive()
        assert time.monotonic() < end


@pytest.mark.process
def test_a_restarted_worker_that_hangs_is_replaced(pool: ScriptedPool) -> None:
    pool.programs = [_with_path(READY), HANGS, DIES]
    pool.start(60)
    pool._start_deadline_s = 0.3
    assert pool.send(0, b"rank", TICKET, b"ends it")
    assert all_replaced(pool, 3) == [0, -9, 3]


@pytest.mark.process
def test_workers_that_die_again_and_again_end_the_loader(pool: ScriptedPool) -> None:
    pool.programs = [_with_path(READY), DIES]
    pool.start(60)
    assert pool.send(0, b"rank", TICKET, b"ends it")
    with pytest.raises(StokerError, match="workers died 21 times, the last with code 3: giving up"):
        all_replaced(pool, 30)


def test_a_folder_that_holds_no_socket_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with (
        zmq.Context() as context,
        pytest.raises(
            ConfigError, match=r"no socket for the workers can be made in .*longlong.*: set TMPDIR to another"
        ),
    ):
        WorkerPool(context, folder, 2, 1)


def _with_path(program: str) -> str:
    return f"import sys; sys.path[:] = {sys.path!r}\n{program}"


@pytest.mark.process
def test_a_worker_that_cannot_be_started_now_is_started_later(
    pool: ScriptedPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool.programs = [_with_path(READY)]
    pool.start(30)
    spawn, failures = pool._spawn, [errno.EMFILE, errno.EAGAIN, errno.ENOMEM]

    def failing(index: int) -> subprocess.Popen[bytes]:
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number))
        return spawn(index)

    monkeypatch.setattr(pool, "_spawn", failing)
    pool._processes[0].kill()
    assert replaced(pool) == -9
    assert len(failures) == 2
    assert not pool.send(0, b"rank", TICKET, b"frame")  # answered with `unavailable`
    assert pool.replace_dead() == []  # told once
    assert pool.replace_dead() == []
    assert failures == []
    assert pool.replace_dead() == []
    wait_until(lambda: pool.receive() or pool.send(0, b"rank", TICKET, b"frame"), 30, "a worker that is ready")
    assert pool._restarts == 1
    assert "worker 0 cannot be started" in caplog.text
