"""Spawned worker processes and a Ctrl-C that ends them cleanly."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import ParamSpec, Self, TypeVar

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into one KeyboardInterrupt; later ones cannot disturb the cleaning up.

    A context manager. After an interrupt its handlers stay: the program is on its way out.
    """

    def __init__(self) -> None:
        self._seen = False
        self._held = False

    def __enter__(self) -> Self:
        self._previous = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        if not self._seen:
            for each, handler in self._previous.items():
                signal.signal(each, handler)

    def _handle(self, number: int, frame: object) -> None:
        first, self._seen = not self._seen, True
        if first and not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Raises the interrupt only after the block; processes started in it never see a Ctrl-C.

        Both are needed. A child inherits the mask. But the mask does not keep Python's handler from running, because the signal
        may arrive in another thread of this process (numpy and tqdm have some).
        """
        self._held = True
        # Started with the first process, it would unblock SIGINT in this thread again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            self._held = False
        if self._seen:
            raise KeyboardInterrupt


class Workers:
    """A pool of spawned processes; a context manager that leaves none behind. They must not write files."""

    def __init__(self, num_processes: int, interrupts: Interrupts) -> None:
        # One thread each: the processes are the parallelism, and sums must not depend on the machine's cores.
        os.environ.update(OMP_NUM_THREADS="1", LP_NUM_THREADS="1")
        self._interrupts = interrupts
        self._pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        if kind is not None:
            # Their answers are no longer needed.
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def ask(
        self, function: Callable[Parameters, Answer], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Answer]:
        """Queues one call; starts a process for it while there are fewer than asked for."""
        with self._interrupts.held_back():
            return self._pool.submit(function, *args, **kwargs)
