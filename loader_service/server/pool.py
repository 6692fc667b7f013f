"""Runs tickets in worker processes (start, forward, restart, stop), or in threads of the server's process."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import msgpack
import psutil
import zmq

from loader_service.pieces.builder import Counters
from loader_service.pieces.service import PieceService, settle_process
from loader_service.pieces.worker import ENDPOINT
from stoker_proto.errors import ConfigError, StokerError
from stoker_proto.host.trouble import host_error
from stoker_proto.wire.messages import Ticket

logger = logging.getLogger(__name__)

_POLLIN = int(zmq.POLLIN)  # arithmetic with zmq's own flags makes an object each time
_WARN_EVERY_S = 30.0
_KILL_DEADLINE_S = 5.0
_MAX_RESTARTS = 20  # over a loader's life: a worker that dies again and again has a cause that a restart does not cure


class Pool(Protocol):
    """Takes tickets from the server and returns frames."""

    num_workers: int
    num_threads: int
    """Building threads over all workers."""

    @property
    def readable(self) -> Any:
        """What a poller watches for answers: a socket or a file descriptor."""

    def start(self, deadline_s: float) -> None: ...

    def send(self, index: int, address: bytes, ticket: Ticket, frame: bytes) -> bool: ...

    def acknowledge(self) -> None: ...

    def receive(self) -> tuple[bytes, zmq.Frame | bytes] | None: ...

    def replace_dead(self) -> list[int]: ...

    def counters(self) -> Counters: ...

    def cpu_s(self) -> float: ...

    def resident_bytes(self) -> int: ...

    def stop(self) -> None: ...


class WorkerPool:
    """`num_workers` worker processes behind one ROUTER socket on a Unix socket inside the run directory."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], run_dir: Path, num_workers: int, num_threads: int
    ) -> None:
        """num_threads: of each worker."""
        self.num_workers, self.num_threads = num_workers, num_workers * num_threads
        self._run_dir = run_dir
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ready: set[int] = set()
        self._due: dict[int, float] = {}  # restarted worker -> when it must be ready
        self._down: set[int] = set()  # died, and could not be started again yet
        self._next_warning = 0.0
        self._start_deadline_s = 0.0
        self._counters = [Counters() for _ in range(num_workers)]
        self._past = Counters()  # of workers that died
        self._restarts = 0
        self.readable = context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 64),  # answers of one worker; the rest waits there
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 1),  # a restarted worker takes its name over
        ):
            self.readable.setsockopt(option, value)
        try:
            self.readable.bind(f"ipc://{run_dir}/{ENDPOINT}")
        except zmq.ZMQError as error:
            self.readable.close(0)
            raise ConfigError(
                f"no socket for the workers can be made in {run_dir} ({error}): set TMPDIR to another folder, with a short path"
            ) from error

    def start(self, deadline_s: float) -> None:
        """Start all workers and wait until each has said that it is ready."""
        self._start_deadline_s = deadline_s
        self._processes = [self._spawn(index) for index in range(self.num_workers)]
        deadline = time.monotonic() + deadline_s
        while len(self._ready) < self.num_workers:
            for index, process in enumerate(self._processes):
                if process.poll() is not None:
                    raise StokerError(f"worker {index} ended with code {process.returncode} at its start; see above")
            if time.monotonic() > deadline:
                raise StokerError(f"workers were not ready after {deadline_s:.0f} s")
            if self.readable.poll(100):
                self.receive()

    def send(self, index: int, address: bytes, ticket: Ticket, frame: bytes) -> bool:
        """Forward a ticket, as it is and as the frame it came in; False where that worker is being restarted."""
        return self._send(index, address, frame)

    def _send(self, index: int, address: bytes, frame: bytes) -> bool:
        if index not in self._ready:
            return False
        try:
            self.readable.send_multipart([b"%d" % index, address, frame])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def receive(self) -> tuple[bytes, zmq.Frame] | None:
        """(client address, frame) of one answer, or None where there is none."""
        while has_message(self.readable):
            name, address, frame, counters = self.readable.recv_multipart(copy=False)
            index = int(name.bytes)
            self._counters[index] = Counters(*msgpack.unpackb(counters.bytes))
            if address.bytes:
                return address.bytes, frame
            self._ready.add(index)
            self._due.pop(index, None)
        return None

    def acknowledge(self) -> None:
        """The poller saw `readable`: nothing to do for a socket."""

    def replace_dead(self) -> list[int]:
        """Restart workers that died, or that were restarted and do not become ready; their numbers.

        StokerError when they die again and again."""
        for index, due in self._due.items():
            if time.monotonic() > due and self._processes[index].poll() is None:
                logger.error("worker %d was not ready %.0f s after its restart", index, self._start_deadline_s)
                self._processes[index].kill()
                self._processes[index].wait()
        ended = [index for index, process in enumerate(self._processes) if process.poll() is not None]
        dead = [index for index in ended if index not in self._down]
        for index in dead:
            code = self._processes[index].returncode
            self._restarts += 1
            if self._restarts > _MAX_RESTARTS:
                raise StokerError(
                    f"workers died {self._restarts} times, the last with code {code}: giving up; see the log"
                )
            logger.error("worker %d ended with code %s and is started again", index, code)
            self._ready.discard(index)
            self._past = self._past + self._counters[index].without_gauges()
            self._counters[index] = Counters()
            self._down.add(index)
            self._due.pop(index, None)
        for index in ended:
            self._start_again(index)
        return dead

    def _start_again(self, index: int) -> None:
        """Start a worker that died; where the host is in trouble it stays down, until the next look."""
        try:
            self._processes[index] = self._spawn(index)
        except (OSError, MemoryError) as error:
            trouble = host_error(error, f"worker {index} cannot be started")
            if trouble is None:
                raise
            if time.monotonic() > self._next_warning:
                self._next_warning = time.monotonic() + _WARN_EVERY_S
                logger.warning("%s; tried again until it can", trouble)
            return
        self._down.discard(index)
        self._due[index] = time.monotonic() + self._start_deadline_s

    def counters(self) -> Counters:
        """Sums over all workers since the start."""
        total = self._past
        for counters in self._counters:
            total = total + counters
        return total

    def cpu_s(self) -> float:
        """CPU seconds of this process and of all its workers, the dead ones too."""
        total = sum(os.times()[:4])  # user, system, and the same of children that have ended
        for process in self._processes:
            try:
                times = psutil.Process(process.pid).cpu_times()
            except psutil.NoSuchProcess:
                continue  # it has just ended: the next call counts it among the children
            total += times.user + times.system
        return total

    def resident_bytes(self) -> int:
        """Of this process and of all its workers."""
        total: int = psutil.Process().memory_info().rss
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += psutil.Process(process.pid).memory_info().rss
        return total

    def stop(self) -> None:
        """End all workers: first asked, then killed."""
        for index in range(len(self._processes)):
            self._send(index, b"", b"")
        deadline = time.monotonic() + 2.0
        for process in self._processes:
            try:
                process.wait(max(0.05, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                try:
                    process.wait(_KILL_DEADLINE_S)
                except subprocess.TimeoutExpired:  # the kernel ends it when the file system answers
                    logger.error("worker process %d hangs in the kernel: it is left behind", process.pid)
        self.readable.close(0)

    def _spawn(self, index: int) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "loader_service.pieces.worker",
            str(self._run_dir),
            str(index),
            str(os.getpid()),
        ]
        environment = dict(os.environ)
        # The worker finds the same packages, also where the front was started with a changed path.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
            environment.setdefault(name, "1")  # parallelism is the worker's own threads, not a library's pool
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)


class InlinePool:
    """No worker processes: the builder threads run in the server's own process, and frames are not copied between processes.

    It uses a seventh less CPU per sample on hosts with few cores; with many cores the interpreter lock limits it.
    """

    num_workers = 1

    def __init__(self, run_dir: Path, num_threads: int) -> None:
        self._run_dir, self.num_threads = run_dir, num_threads
        self.readable = -1

    def start(self, deadline_s: float) -> None:
        """Create the service; there is nothing to wait for."""
        self._service = PieceService(self._run_dir)
        settle_process()
        self.readable = self._service.readable

    def send(self, index: int, address: bytes, ticket: Ticket, frame: bytes) -> bool:
        """Begin a ticket."""
        self._service.submit(address, ticket)
        return True

    def acknowledge(self) -> None:
        """The poller saw `readable`."""
        self._service.acknowledge()

    def receive(self) -> tuple[bytes, bytes] | None:
        """(client address, frame) of one answer, or None where there is none."""
        return self._service.take()

    def replace_dead(self) -> list[int]:
        """Threads do not die alone: when one fails the process ends."""
        return []

    def counters(self) -> Counters:
        """Since the start."""
        return self._service.counters

    def cpu_s(self) -> float:
        """CPU seconds of this process."""
        return time.process_time()

    def resident_bytes(self) -> int:
        """Of this process."""
        return int(psutil.Process().memory_info().rss)

    def stop(self) -> None:
        """Stop the threads."""
        if self.readable >= 0:
            self._service.close()


def has_message(socket: zmq.Socket[bytes]) -> bool:
    """Whether one waits; a tenth of the cost of `socket.poll(0)`."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _POLLIN)
