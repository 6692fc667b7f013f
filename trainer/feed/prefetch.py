"""The queue between the socket thread and the consumer: a few threads decode pieces; micro-batches come out in order.

The core's window bounds how many micro-batches are in here: the feed returns a credit to the core after each `take`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from stoker_proto.wire.messages import Piece
from trainer.feed.batch import MicroBatch
from trainer.feed.client.commands import Deliver, Opened
from trainer.feed.client.schedule import Slice


class Prefetcher:
    """The `Sink` of a `SocketDriver`; the consumer uses `take` and `epoch`."""

    def __init__(self, build: Callable[[Sequence[Piece]], MicroBatch], threads: int) -> None:
        """build: makes a micro-batch, on the decode threads. Image decoding releases the interpreter lock."""
        self._build = build
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="stoker-decode")
        self._changed = threading.Condition()
        self._ready: deque[tuple[Slice, Future[MicroBatch]]] = deque()
        self._opened: dict[int, Opened] = {}  # by epoch
        self._session = -1
        self._error: BaseException | None = None
        self._closed = False

    # -- the driver's side

    def opened(self, command: Opened) -> None:
        """Keep an epoch's sizes."""
        with self._changed:
            self._opened[command.epoch] = command
            self._changed.notify_all()

    def deliver(self, command: Deliver) -> None:
        """Start to decode the next micro-batch; drops one that an earlier session asked for."""
        with self._changed:
            if self._closed or command.session != self._session:
                return
            self._ready.append((command.slice, self._pool.submit(self._build, command.pieces)))
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Raise this error in the consumer, after the micro-batches that are ready."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    # -- the consumer's side

    def warm_up(self, call: Callable[[], object]) -> None:
        """Call this on a decode thread now, so that the first micro-batch need not wait for it. That batch raises its error."""
        self._pool.submit(call)

    def begin(self, session: int, epoch: int) -> None:
        """Drop all micro-batches; from now on accept only those of this session."""
        with self._changed:
            self._opened = {known: opened for known, opened in self._opened.items() if abs(known - epoch) < 2}
            self._session = session
            for _, future in self._ready:
                future.cancel()
            self._ready.clear()

    def take(self) -> tuple[Slice, MicroBatch, float]:
        """(slice, micro-batch, seconds waited for it). Raises the feed's error."""
        began = time.monotonic()
        with self._changed:
            while not self._ready:
                self._wait()
            slice_, future = self._ready.popleft()
        batch = future.result()
        return slice_, batch, time.monotonic() - began

    def epoch(self, epoch: int) -> Opened:
        """Wait for an epoch's sizes. Raises the feed's error."""
        with self._changed:
            while epoch not in self._opened:
                self._wait()
            return self._opened[epoch]

    @property
    def num_ready(self) -> int:
        """Micro-batches that are decoded or being decoded."""
        return len(self._ready)

    def close(self) -> None:
        """Stop the decode threads. A consumer that still waits gets an error."""
        with self._changed:
            self._closed = True
            self._error = self._error or RuntimeError("the feed is closed")
            self._ready.clear()
            self._changed.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._changed.wait()
