"""Calls of libraries that know no time-out: each in a thread of its own, which is left to itself when it takes too long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from stoker_proto.errors import FetchError

MAX_LEFT = 64
"""Threads left to themselves at the same time; then nothing is called any more until one of them ends."""

Result = TypeVar("Result")
_lock = threading.Lock()
_left: set[threading.Thread] = set()


def call_within(timeout_s: float, call: Callable[[], Result]) -> Result:
    """What the call gives. Raises what it raises, TimeoutError after a time, FetchError where too many others hang.

    The call may go on after that: it must not write where somebody else does.
    """
    with _lock:
        if len(_left) >= MAX_LEFT:
            raise FetchError(
                f"{MAX_LEFT} calls of file systems that know no time-out hang: is the storage reachable? When it is, they end; "
                "else start this process again"
            )
    thread = _Call(call)
    thread.start()
    if not thread.is_over.wait(timeout_s):
        with _lock:
            if not thread.is_over.is_set():
                _left.add(thread)
                raise TimeoutError(f"no answer in {timeout_s:g} s")
    if thread.error is not None:
        raise thread.error
    return thread.results[0]


class _Call(threading.Thread, Generic[Result]):
    """A daemon: a process ends without it."""

    def __init__(self, call: Callable[[], Result]) -> None:
        super().__init__(name="remote-call", daemon=True)
        self._call = call
        self.is_over = threading.Event()
        self.results: list[Result] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.results.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised where it was asked for
            self.error = error
        with _lock:
            self.is_over.set()
            _left.discard(self)
