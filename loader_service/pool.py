"""The front's hold on its worker processes: start, forward, restart, stop."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import psutil
import zmq

from loader_service.builder import Counters
from stoker_proto.errors import StokerError

logger = logging.getLogger(__name__)

_PREFIX = "stoker-loader-"
_MAX_RESTARTS = 20  # over a loader's life: a worker that dies again and again has a cause that a restart does not cure


@contextmanager
def run_directory() -> Iterator[Path]:
    """A private folder (mode 0700) for sockets and plans, removed at the end; also removes those of killed loaders."""
    base = Path(tempfile.gettempdir())
    for old in base.glob(f"{_PREFIX}*"):
        owner = old.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)) and old.stat().st_uid == os.getuid():
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class WorkerPool:
    """`num_workers` worker processes behind one ROUTER socket on a Unix socket inside the run directory."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], run_dir: Path, num_workers: int) -> None:
        self.endpoint = f"ipc://{run_dir}/workers"
        self.num_workers = num_workers
        self._run_dir = run_dir
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ready: set[int] = set()
        self._counters = [Counters() for _ in range(num_workers)]
        self._past = Counters()  # of workers that died
        self._past_cpu_s = 0.0
        self._restarts = 0
        self.socket = context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 1),  # a restarted worker takes its name over
        ):
            self.socket.setsockopt(option, value)
        self.socket.bind(self.endpoint)

    def start(self, deadline_s: float) -> None:
        """Start all workers and wait until each has said that it is ready."""
        self._processes = [self._spawn(index) for index in range(self.num_workers)]
        deadline = time.monotonic() + deadline_s
        while len(self._ready) < self.num_workers:
            if not self.socket.poll(100):
                for index, process in enumerate(self._processes):
                    if process.poll() is not None:
                        raise StokerError(
                            f"worker {index} ended with code {process.returncode} at its start; see above"
                        )
                if time.monotonic() > deadline:
                    raise StokerError(f"workers were not ready after {deadline_s:.0f} s")
                continue
            self.receive()

    def send(self, index: int, address: bytes, frame: zmq.Frame | bytes) -> bool:
        """Forward a ticket; False where that worker is not there (it is being restarted)."""
        if index not in self._ready:
            return False
        try:
            self.socket.send_multipart([b"%d" % index, address, frame])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def receive(self) -> tuple[int, bytes, zmq.Frame] | None:
        """(worker, client address, frame) of one message, or None where it only said that it is ready."""
        name, address, frame, counters = self.socket.recv_multipart(copy=False)
        index = int(name.bytes)
        self._counters[index] = Counters(*msgpack.unpackb(counters.bytes))
        if not address.bytes:
            self._ready.add(index)
            return None
        return index, address.bytes, frame

    def replace_dead(self) -> list[int]:
        """Restart workers that died; their numbers. StokerError when they die again and again."""
        dead = [i for i in self._ready if self._processes[i].poll() is not None]
        for index in dead:
            code = self._processes[index].returncode
            self._restarts += 1
            if self._restarts > _MAX_RESTARTS:
                raise StokerError(
                    f"workers died {self._restarts} times, the last with code {code}: giving up; see the log"
                )
            logger.error("worker %d ended with code %s and is started again", index, code)
            self._ready.discard(index)
            self._past = _sum(self._past, self._counters[index])
            self._counters[index] = Counters()
            self._processes[index] = self._spawn(index)
        return dead

    def counters(self) -> Counters:
        """Sums over all workers since the start."""
        total = self._past
        for counters in self._counters:
            total = _sum(total, counters)
        return total

    def cpu_s(self) -> float:
        """CPU seconds of this process and of all its workers, the dead ones too."""
        total = sum(os.times()[:4])  # user, system, and the same of children that have ended
        for process in self._processes:
            try:
                times = psutil.Process(process.pid).cpu_times()
            except psutil.NoSuchProcess:
                continue  # it ended this moment: the next reading has it among the children
            total += times.user + times.system
        return total

    def stop(self) -> None:
        """End all workers: first asked, then killed."""
        for index in range(len(self._processes)):
            self.send(index, b"", b"")
        deadline = time.monotonic() + 2.0
        for process in self._processes:
            try:
                process.wait(max(0.05, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.socket.close(0)

    def _spawn(self, index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "loader_service.worker", str(self._run_dir), str(index)]
        environment = dict(os.environ)
        # The worker finds the same packages, also where the front was started with a changed path.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
            environment.setdefault(name, "1")  # parallelism is the worker's own threads, not a library's pool
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)


def _sum(first: Counters, second: Counters) -> Counters:
    return Counters(
        samples=first.samples + second.samples,
        records_decoded=first.records_decoded + second.records_decoded,
        records_distinct=first.records_distinct + second.records_distinct,
        skipped=first.skipped + second.skipped,
    )
