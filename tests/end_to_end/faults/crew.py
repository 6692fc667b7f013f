"""Loaders at fixed addresses that can be killed, stopped, slowed, drained and started again, and what they use of the host."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from stoker_proto.host.ports import free_port
from tests.end_to_end.fleet import ROOT, Loader, serving
from tests.support.started import STARTED_BY


class Crew:
    """Some loaders of one config. Closing ends them all, however they stand."""

    def __init__(self, config: Path, count: int, *arguments: str, log: Path | None = None) -> None:
        self.addresses = [f"tcp://127.0.0.1:{free_port()}" for _ in range(count)]
        self.config, self._arguments, self._log = config, arguments, log
        self._owner = {name: os.environ[name] for name in (STARTED_BY,) if name in os.environ}  # also of later starts
        self._running: dict[int, tuple[ExitStack, Loader]] = {}
        self._lock = threading.Lock()
        for number in range(count):
            self.start(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number in list(self._running):
            self.signal(number, signal.SIGCONT)
            self._running.pop(number)[0].close()

    def start(self, number: int, *more: str, config: Path | None = None, cwd: Path = ROOT, **env: str) -> None:
        """Start it at its address, perhaps as another loader than it was; it must not run."""
        with self._lock:
            stack = ExitStack()
            bind = "--bind", self.addresses[number]
            loader = stack.enter_context(
                serving(
                    config or self.config, *self._arguments, *more, *bind, cwd=cwd, log=self._log, **self._owner, **env
                )
            )
            self._running[number] = stack, loader

    def signal(self, number: int, sign: int) -> None:
        """Send a signal to the front and its workers."""
        process = psutil.Process(self.pid(number))
        for each in [process, *process.children(recursive=True)]:
            each.send_signal(sign)

    def kill(self, number: int) -> None:
        """SIGKILL; gone when this returns."""
        stack, loader = self._running.pop(number)
        loader.end(signal.SIGKILL)
        stack.close()

    def drain(self, number: int) -> int:
        """SIGTERM, and wait; the exit code."""
        stack, loader = self._running.pop(number)
        code = loader.end(signal.SIGTERM)
        stack.close()
        return code

    def restart(self, number: int) -> None:
        """Drain it, if it runs, and start it anew as what it was."""
        if number in self._running:
            self.drain(number)
        self.start(number)

    def pid(self, number: int) -> int:
        """Of the front."""
        return self._running[number][1].process.pid

    def all_well(self) -> None:
        """Whatever a test did: all run again."""
        for number in range(len(self.addresses)):
            if number in self._running and self._running[number][1].process.poll() is not None:
                self._running.pop(number)[0].close()
            if number in self._running:
                self.signal(number, signal.SIGCONT)
            else:
                self.start(number)


@contextmanager
def slowed(pid: int, share: float, period_s: float = 0.2) -> Iterator[None]:
    """Let the process run only this share of the time, by SIGSTOP and SIGCONT."""
    over = threading.Event()

    def cycle() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait((1 - share) * period_s)
            os.kill(pid, signal.SIGCONT)
            over.wait(share * period_s)

    thread = threading.Thread(target=cycle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Run it in a thread beside the block; what it raises is raised at the block's end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (the thread's edge: raised below)
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(300)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def rss_bytes(pid: int) -> int:
    """Resident memory of the process and its children."""
    process = psutil.Process(pid)
    return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])


def num_fds(pid: int) -> int:
    """Open file descriptors of the process."""
    return psutil.Process(pid).num_fds()


def num_connections(pid: int) -> int:
    """TCP connections that the process has now."""
    return sum(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process(pid).net_connections("tcp"))


def peak_rss(pid: int, over: threading.Event) -> list[int]:
    """Samples of `rss_bytes` every 20 ms until the event is set; run it in a thread."""
    found = []
    while not over.is_set():
        found.append(rss_bytes(pid))
        time.sleep(0.02)
    return found
