"""Why a run ends before its last step: a signal, or `trainer.max_time`; and the exit code that says so.

    SIGTERM                143: whoever sent it knows
    SIGUSR1, time limit    75, sysexits' EX_TEMPFAIL: the same command resumes

Each rank has a reason of its own or none. The loop takes the largest number of all ranks, so all end after the same step.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_TRY_AGAIN = 75


class EarlyEnd:
    """The decision of one run."""

    def __init__(self, limit_s: float | None) -> None:
        """limit_s: `trainer.max_time` in seconds, from `start` on; None: no limit."""
        self._limit_s, self._started = limit_s, time.monotonic()
        self.is_decided = False
        self.exit_code = 0
        """Of the process, when the run has ended."""

    def start(self) -> None:
        """The time limit begins now."""
        self._started = time.monotonic()

    def reason(self, stop_signal: Callable[[], int]) -> int:
        """The number of this rank's signal, SIGALRM for the time limit, or 0."""
        number = stop_signal()
        if not number and self._limit_s is not None and time.monotonic() - self._started >= self._limit_s:
            return signal.SIGALRM
        return number

    def decide(self, reason: int, step: int) -> None:
        """End after this step, if there is a reason. reason: the largest number of all ranks; 0: none."""
        if not reason or self.is_decided:
            return
        self.is_decided = True
        self.exit_code = 128 + reason if reason == signal.SIGTERM else _TRY_AGAIN
        name = "trainer.max_time" if reason == signal.SIGALRM else signal.Signals(reason).name
        log.info("step %d: %s ends the run; a checkpoint is written first", step, name)
