"""How a rank ends early: on a stop signal, or when DeepSpeed's runner is gone. It logs one line.

A separate thread logs it; a signal wakes the thread at once (`signal.set_wakeup_fd`). The main thread may be waiting inside NCCL
or gloo, where no Python handler runs.

    SIGINT      log the line; the main thread gets its KeyboardInterrupt as usual; nothing is saved
    SIGUSR1     during training: ask the loop to save and end. All ranks agree on the step: see `early_end`
    SIGTERM     the same, but the process ends after a grace time in any case. More of them change nothing: DeepSpeed's launcher
                sends one to each rank when it gets one itself, and when another rank has ended. Before the first step, or
                after a SIGINT: log the line, unless that was done already, and end the process
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from stoker_proto.host.interrupts import heed_interrupts
from trainer.process.parents import DeepSpeedParents

log = logging.getLogger(__name__)

_INTERVAL_S = 1.0
"""Between two checks of the parent processes."""
_LAUNCHER_GRACE_S = 15.0
"""A rank without its launcher ends after this time. It is longer than the 10 s after which deploy/launch.py looks for left-over
processes: DeepSpeed's runner exits with 0 then, and only left-over ranks show that the run has failed."""
_LOG_DEADLINE_S = 5
"""For logging the line: a full stderr pipe without a reader must not keep a rank alive."""


def _only_wake(number: int, frame: FrameType | None) -> None:
    """The handler of signals that the thread acts on: without one nothing is written to its pipe."""


class StopSignals:
    """Ends this process on a stop signal, or with its DeepSpeed parents. Make one, in the main thread, before slow imports."""

    def __init__(self, parents: DeepSpeedParents | None) -> None:
        """parents: processes to watch; None: only signals end this process."""
        self.describe_run: Callable[[], str] = lambda: "before its first step"
        """Returns where the run stands and how it resumes, for the log line. Called in the thread."""
        self._parents = parents
        self._logs = os.environ.get("LOCAL_RANK", "0") == "0"  # the other ranks of this machine would log the same
        self._lock = threading.RLock()
        self._is_logged = False
        self.requested = 0
        """Number of the signal that asked the loop to save and end; 0: none did."""
        self._grace_s: float | None = None
        self._ends_at: float | None = None
        self._read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        heed_interrupts()
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _only_wake)
        signal.signal(signal.SIGUSR1, _only_wake)
        # deploy/launch.py starts programs with it blocked: one that came since the start arrives now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        threading.Thread(target=self._watch, name="stop-signals", daemon=True).start()

    def _watch(self) -> None:
        alone_since: float | None = None
        while True:
            ready, _, _ = select.select([self._read_end], [], [], _INTERVAL_S)
            # Of signals that came together the kernel may run the last one's handler first: SIGINT is the lowest number.
            for number in sorted(os.read(self._read_end, 64)) if ready else ():
                if number == signal.SIGTERM:
                    self._on_term()
                elif number == signal.SIGUSR1 and self._grace_s is not None and not self.requested:
                    self._ask(number, "SIGUSR1: a checkpoint is written after this step, then the run ends")
                elif number == signal.SIGINT:
                    self._log_once("interrupted by SIGINT")
            if self._ends_at is not None and time.monotonic() >= self._ends_at:
                self._end(128 + signal.SIGTERM, f"interrupted by SIGTERM, not saved within {self._grace_s:g} s,")
            if self._parents is None:
                continue
            if self._parents.runner_is_gone:
                self._end(1, f"the deepspeed command (process {self._parents.runner}) is gone, so this rank ends")
            if self._parents.launcher_is_gone:
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since >= _LAUNCHER_GRACE_S:
                    self._end(1, f"DeepSpeed's launcher (process {self._parents.launcher}) is gone, so this rank ends")

    def begin_training(self, grace_s: float) -> None:
        """From now on signals ask the loop to save. grace_s: how long after SIGTERM the process may still run."""
        self._grace_s = grace_s

    def _on_term(self) -> None:
        """The first SIGTERM of a training asks the loop, and starts the grace time. One outside a training ends the process."""
        if self._ends_at is not None:
            return
        if self._grace_s is None or self._is_logged:
            self._end(128 + signal.SIGTERM, "interrupted by SIGTERM")
            return
        self._ends_at = time.monotonic() + self._grace_s
        self._ask(signal.SIGTERM, "SIGTERM: a checkpoint is written after this step, then the run ends")

    def _ask(self, number: int, why: str) -> None:
        self.requested = number
        if self._logs:
            log.warning("%s", why)

    def _end(self, code: int, why: str) -> None:
        signal.alarm(_LOG_DEADLINE_S)
        try:
            self._log_once(why)
        finally:
            os._exit(code)

    def _log_once(self, why: str) -> None:
        with self._lock:
            if self._logs and not self._is_logged:
                self._is_logged = True
                log.warning("%s %s", why, self.describe_run())
