"""How a rank ends before its work is done: a stop signal, or DeepSpeed's runner is gone. It says so in one line.

The line comes from a thread of its own, which a signal wakes at once (`signal.set_wakeup_fd`), as the main thread may be waiting
inside NCCL or gloo, where no Python handler runs. Nothing is saved then: ranks that stand at different places cannot write a
checkpoint.

    SIGINT      the line; the main thread gets its KeyboardInterrupt, as ever
    SIGTERM     the line, unless a SIGINT had it said already; then the process ends
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

from trainer.process.parents import Starters

log = logging.getLogger(__name__)

_INTERVAL_S = 1.0
"""Between two looks at those who started this rank."""
_LAUNCHER_GRACE_S = 15.0
"""A rank without its launcher ends after this: later than deploy/launch.py looks for what DeepSpeed left (10 s), as DeepSpeed's
runner then exits with 0, and only ranks that are left over show that this was no success."""
_LAST_WORDS_S = 5
"""For the line; a stderr that nobody reads must not keep a rank alive."""


class Ending:
    """Make one per process, in the main thread, before anything that takes long."""

    def __init__(self, starters: Starters | None) -> None:
        """starters: whom to watch; None: nobody."""
        self.standing: Callable[[], str] = lambda: "before its first step"
        """Where the run stands, and what a new start makes of it; it is called in the thread."""
        self._starters = starters
        self._speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # the others of this machine would say the same
        self._lock = threading.RLock()
        self._is_said = False
        self._read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_term)  # without a handler nothing is written to the pipe
        threading.Thread(target=self._watch, name="ending", daemon=True).start()

    def _watch(self) -> None:
        alone_since: float | None = None
        while True:
            ready, _, _ = select.select([self._read_end], [], [], _INTERVAL_S)
            for number in os.read(self._read_end, 64) if ready else b"":
                if number == signal.SIGTERM:
                    self._end(128 + number, "interrupted by SIGTERM")
                elif number == signal.SIGINT:
                    self._say("interrupted by SIGINT")
            if self._starters is None:
                continue
            if self._starters.runner_is_gone:
                self._end(1, f"the deepspeed command (process {self._starters.runner}) is gone, so this rank ends")
            if self._starters.launcher_is_gone:
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since >= _LAUNCHER_GRACE_S:
                    self._end(1, f"DeepSpeed's launcher (process {self._starters.launcher}) is gone, so this rank ends")

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, and often later than the other: whichever comes first."""
        self._end(128 + number, "interrupted by SIGTERM")

    def _end(self, code: int, why: str) -> None:
        signal.alarm(_LAST_WORDS_S)
        try:
            self._say(why)
        finally:
            os._exit(code)

    def _say(self, why: str) -> None:
        with self._lock:
            if self._speaks and not self._is_said:
                self._is_said = True
                log.warning("%s %s", why, self.standing())
