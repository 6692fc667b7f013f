"""A timeout for calls of libraries that have none: each call runs in a thread, which is abandoned when it takes too long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from stoker_proto.errors import FetchError

MAX_LEFT = 64
"""Abandoned threads at the same time; beyond that, every call raises until one of them ends."""

Result = TypeVar("Result")
_lock = threading.Lock()
_left: set[threading.Thread] = set()


def call_within(timeout_s: float, call: Callable[[], Result]) -> Result:
    """The result of the call. Raises what the call raises, TimeoutError, and FetchError if too many other calls hang.

    The call may continue after the timeout: it must not write to a shared place.
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
    """A daemon thread: the process does not wait for it at its end."""

    def __init__(self, call: Callable[[], Result]) -> None:
        super().__init__(name="remote-call", daemon=True)
        self._call = call
        self.is_over = threading.Event()
        self.results: list[Result] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.results.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised by `call_within`
            self.error = error
        with _lock:
            self.is_over.set()
            _left.discard(self)
