"""How a rank ends early: on a stop signal, or when DeepSpeed's runner is gone. It logs one line.

A separate thread logs it; a signal wakes the thread at once (`signal.set_wakeup_fd`). The main thread may be waiting inside NCCL
or gloo, where no Python handler runs. Nothing is saved: ranks that stand at different steps cannot write a checkpoint.

    SIGINT      log the line; the main thread gets its KeyboardInterrupt as usual
    SIGTERM     log the line, unless a SIGINT has done so already; then end the process
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
        self._read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        heed_interrupts()
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_term)  # without a handler nothing is written to the pipe
        threading.Thread(target=self._watch, name="stop-signals", daemon=True).start()

    def _watch(self) -> None:
        alone_since: float | None = None
        while True:
            ready, _, _ = select.select([self._read_end], [], [], _INTERVAL_S)
            for number in os.read(self._read_end, 64) if ready else b"":
                if number == signal.SIGTERM:
                    self._end(128 + number, "interrupted by SIGTERM")
                elif number == signal.SIGINT:
                    self._log_once("interrupted by SIGINT")
            if self._parents is None:
                continue
            if self._parents.runner_is_gone:
                self._end(1, f"the deepspeed command (process {self._parents.runner}) is gone, so this rank ends")
            if self._parents.launcher_is_gone:
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since >= _LAUNCHER_GRACE_S:
                    self._end(1, f"DeepSpeed's launcher (process {self._parents.launcher}) is gone, so this rank ends")

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, often later than the other thread: whichever comes first ends the process."""
        self._end(128 + number, "interrupted by SIGTERM")

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
