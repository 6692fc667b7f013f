"""Calls from other threads that the serving loop makes: it alone touches its state, so nothing of it needs a lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopCalls:
    """`call` from any thread; the loop calls `answer` when it is woken."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._posted: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def call(self, look: Callable[[], T], deadline_s: float) -> T:
        """What the call returned in the loop. Raises TimeoutError if the loop does not come to it in time."""
        answer: Future[T] = Future()
        self._posted.append((look, answer))
        self._wake()
        try:
            return answer.result(deadline_s)
        finally:
            answer.cancel()

    def answer(self) -> None:
        """Make the calls that were posted."""
        while self._posted:
            look, answer = self._posted.popleft()
            if answer.set_running_or_notify_cancel():
                answer.set_result(look())
